// panel_gemv with AVX2: 8 rows a vector.
//
// A 16-bit lane of Dots holds 4 times the sum of 16 products of a code, at most 3, and a signed
// byte: at most 24576 in magnitude.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "quant/host_panels.h"
#include "quant/host_panels_sets.h"

#pragma GCC target("avx2,fma,f16c")
#include "quant/host_panels_kernel.h"

namespace bbb::quant::host {
namespace {

struct Avx2 {
  using Ints = __m256i;
  using Floats = __m256;
  using Dots = __m256i;
  static constexpr int kLanes = 8;

  static Ints load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Ints splat(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints shift_right(Ints x, int by) { return _mm256_srli_epi32(x, by); }
  static Ints shift_left(Ints x, int by) { return _mm256_slli_epi32(x, by); }
  static Ints mask(Ints x, int32_t bits) { return _mm256_and_si256(x, splat(bits)); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }

  static Dots no_dots() { return _mm256_setzero_si256(); }
  static Dots dot(Dots sum, Ints codes, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, splat(four)));
  }
  static Dots four_times(Dots sum) { return _mm256_slli_epi16(sum, 2); }
  static Ints quarter(Ints x) { return _mm256_srai_epi32(x, 2); }
  static Ints total(Dots sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  static Ints bytes(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  // In the lowest 2 bits of a lane.
  static Ints zeros_of_2_bits(const uint8_t* from, int lane) {
    uint16_t eight;
    std::memcpy(&eight, from + lane / 4, 2);
    const Ints by = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    return _mm256_srlv_epi32(splat(eight), by);
  }
  // four[the lowest 2 bits of a lane].
  static Ints one_of_four(const int32_t* four, Ints index) {
    const __m128 values = _mm_loadu_ps(reinterpret_cast<const float*>(four));
    return _mm256_castps_si256(_mm256_permutevar_ps(_mm256_set_m128(values, values), index));
  }
  // E4M3 bits 7 places up are an F16 of e / 256, subnormals too; 0xFF becomes a NaN.
  static Floats scales(const uint8_t* from) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7));
  }

  static Floats no_floats() { return _mm256_setzero_ps(); }
  static Floats to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Floats multiply_add(Floats x, Floats e, float scale, Floats sum) {
    return _mm256_fmadd_ps(x, _mm256_mul_ps(e, _mm256_set1_ps(scale)), sum);
  }
  static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
};

}  // namespace

void panel_gemv_avx2(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                     Rows panels) {
  panel_gemv_on<Avx2>(y, x, w, addend, panels);
}

}  // namespace bbb::quant::host
#endif

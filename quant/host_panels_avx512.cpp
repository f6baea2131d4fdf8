// panel_gemv with AVX-512 VNNI: 16 rows a vector.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "quant/host_panels.h"
#include "quant/host_panels_sets.h"

// GCC 12 warns of undefined vectors inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "quant/host_panels_kernel.h"

namespace bbb::quant::host {
namespace {

struct Avx512 {
  using Ints = __m512i;
  using Floats = __m512;
  using Dots = __m512i;
  static constexpr int kLanes = 16;

  static Ints load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Ints splat(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints shift_right(Ints x, int by) { return _mm512_srli_epi32(x, by); }
  static Ints shift_left(Ints x, int by) { return _mm512_slli_epi32(x, by); }
  static Ints mask(Ints x, int32_t bits) { return _mm512_and_si512(x, splat(bits)); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }

  static Dots no_dots() { return _mm512_setzero_si512(); }
  static Dots dot(Dots sum, Ints codes, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sum, codes, splat(four));
  }
  static Dots four_times(Dots sum) { return shift_left(sum, 2); }
  static Ints total(Dots sum) { return sum; }
  static Ints quarter(Ints x) { return _mm512_srai_epi32(x, 2); }

  static Ints bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // In the lowest 2 bits of a lane.
  static Ints zeros_of_2_bits(const uint8_t* from, int) {
    int32_t all;
    std::memcpy(&all, from, 4);
    const Ints by = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_srlv_epi32(splat(all), by);
  }
  // four[the lowest 2 bits of a lane].
  static Ints one_of_four(const int32_t* four, Ints index) {
    const __m128 values = _mm_loadu_ps(reinterpret_cast<const float*>(four));
    return _mm512_castps_si512(_mm512_permutevar_ps(_mm512_broadcast_f32x4(values), index));
  }
  // E4M3 bits 7 places up are an F16 of e / 256, subnormals too; 0xFF becomes a NaN.
  static Floats scales(const uint8_t* from) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7));
  }

  static Floats no_floats() { return _mm512_setzero_ps(); }
  static Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Floats multiply_add(Floats x, Floats e, float scale, Floats sum) {
    return _mm512_fmadd_ps(x, _mm512_mul_ps(e, _mm512_set1_ps(scale)), sum);
  }
  static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
};

}  // namespace

void panel_gemv_avx512(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                       Rows panels) {
  panel_gemv_on<Avx512>(y, x, w, addend, panels);
}

}  // namespace bbb::quant::host
#endif

// The quantizer's ops on the GPU: passes tensors to the kernels of quant/quantizer.cu.
#include "cuda/cuda_backend.h"
#include "quant/cuda_kernels.h"

namespace bbb::cuda {

namespace {
const quant::WeightTile* tiles_of(const QuantizedWeights& q) {
  return static_cast<const quant::WeightTile*>(q.tiles.raw());
}
}  // namespace

void CudaBackend::do_max_group_range(const QuantizedWeights& q, const Tensor& w) {
  quant::launch_max_group_range(stream_, q.max_range.data<float>(), q.prequantized.data<float>(),
                                q.max_range.numel(), w.data<float>(), q.ratios.data<uint8_t>(),
                                tiles_of(q), q.tiles.dim(0), q.bits.data<int32_t>(), q.group,
                                q.rule.levels);
}

void CudaBackend::do_fake_quant(const QuantizedWeights& q, const Tensor& w) {
  quant::launch_fake_quant(stream_, bf16_of(q.wq), q.e.data<uint8_t>(), q.z.data<uint8_t>(),
                           q.clipped.data<uint8_t>(), q.s.data<float>(), w.data<float>(),
                           q.ratios.data<uint8_t>(), q.max_range.data<float>(),
                           q.prequantized.data<float>(), tiles_of(q), q.tiles.dim(0),
                           q.bits.data<int32_t>(), q.group, q.rule, q.rounding);
}

void CudaBackend::do_nested_levels(const Tensor& wq, const QuantizedWeights& q, const Tensor& w,
                                   int bits, quant::NestedDequant dequant) {
  quant::launch_nested_levels(stream_, bf16_of(wq), w.data<float>(), q.e.data<uint8_t>(),
                              q.z.data<uint8_t>(), q.s.data<float>(), tiles_of(q), q.tiles.dim(0),
                              q.bits.data<int32_t>(), q.group, bits, dequant);
}

void CudaBackend::do_quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e,
                                    const Tensor& z, const Tensor& s, const WeightGrid& spec) {
  quant::launch_quantize_codes(stream_, codes.data<uint8_t>(), w.data<float>(), e.data<uint8_t>(),
                               z.data<uint8_t>(), s.data<float>(), w.numel(), spec);
}

void CudaBackend::do_scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s,
                                 const Tensor& codes, const Tensor& z, const Tensor& sigma,
                                 const WeightGrid& spec) {
  quant::launch_scale_codes(stream_, bf16_of(wq), e.data<uint8_t>(), s.data<float>(),
                            codes.data<uint8_t>(), z.data<uint8_t>(), sigma.data<float>(),
                            codes.numel(), spec);
}

void CudaBackend::do_scale_codes_backward(const Tensor& dsigma, const Tensor& dw,
                                          const Tensor& codes, const Tensor& z,
                                          const WeightGrid& spec, Write mode) {
  with_elements(dw, [&]<typename T>(T* gradient) {
    quant::launch_scale_codes_backward<T>(stream_, static_cast<T*>(dsigma.raw()), gradient,
                                          codes.data<uint8_t>(), z.data<uint8_t>(), codes.numel(),
                                          spec, mode == Write::Add);
  });
}

void CudaBackend::do_ratio_quant(const Tensor& wq, const Tensor& e, const Tensor& z,
                                 const Tensor& s, const Tensor& ratio, const Tensor& w,
                                 const WeightGrid& spec) {
  quant::launch_ratio_quant(stream_, bf16_of(wq), e.data<uint8_t>(), z.data<uint8_t>(),
                            s.data<float>(), ratio.data<float>(), w.data<float>(), w.numel(), spec);
}

void CudaBackend::do_ratio_quant_backward(const Tensor& dw, const Tensor& dratio, const Tensor& w,
                                          const Tensor& e, const Tensor& z, const Tensor& s,
                                          const WeightGrid& spec) {
  with_elements(dw, [&]<typename T>(T* gradient) {
    quant::launch_ratio_quant_backward<T>(stream_, gradient, static_cast<T*>(dratio.raw()),
                                          w.data<float>(), e.data<uint8_t>(), z.data<uint8_t>(),
                                          s.data<float>(), w.numel(), spec);
  });
}

void CudaBackend::do_learned_quant(const Tensor& wq, const Tensor& e, const Tensor& z,
                                   const Tensor& s, const Tensor& w, const Tensor& sigma,
                                   const Tensor& zeta, const WeightGrid& spec) {
  quant::launch_learned_quant(stream_, bf16_of(wq), e.data<uint8_t>(), z.data<uint8_t>(),
                              s.data<float>(), w.data<float>(), sigma.data<float>(),
                              zeta.data<float>(), w.numel(), spec);
}

void CudaBackend::do_learned_quant_backward(const Tensor& dw, const Tensor& dsigma,
                                            const Tensor& dzeta, const Tensor& w, const Tensor& e,
                                            const Tensor& z, const Tensor& s,
                                            const WeightGrid& spec) {
  with_elements(dw, [&]<typename T>(T* gradient) {
    quant::launch_learned_quant_backward<T>(
        stream_, gradient, static_cast<T*>(dsigma.raw()),
        dzeta.defined() ? static_cast<T*>(dzeta.raw()) : nullptr, w.data<float>(),
        e.data<uint8_t>(), z.data<uint8_t>(), s.data<float>(), w.numel(), spec);
  });
}

}  // namespace bbb::cuda

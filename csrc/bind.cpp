// commopt._C: one line per op and no logic. Pointers and streams come as integers; the checks are in commopt/backends/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/run.h"
#include "ops.h"
#ifdef COMMOPT_CUDA
#include "cuda/run.h"
#endif

namespace py = pybind11;
using namespace commopt;
using ptr = uintptr_t;

namespace {

template <class T> T* at(ptr p) { return reinterpret_cast<T*>(p); }

// `where` is the thread count on the CPU and the stream on CUDA. The GIL is free while a kernel runs or is launched.
template <class Run> void bind_ops(py::module_ m, Run run) {
  using Free = py::call_guard<py::gil_scoped_release>;
  m.def("dense_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, int values_dtype, int64_t where) {
    run(DenseEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<void>(values), values_dtype}, where);
  }, Free());
  m.def("dense_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr values, int values_dtype, int64_t where) {
    run(DenseDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<void>(values), values_dtype}, where);
  }, Free());
  m.def("half_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, ptr scales, int block, int64_t where) {
    run(HalfEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint16_t>(values), at<float>(scales), block}, where);
  }, Free());
  m.def("half_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr values, ptr scales, int block, int64_t where) {
    run(HalfDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<uint16_t>(values), at<float>(scales), block}, where);
  }, Free());
  m.def("absmax", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr out, float divisor, int64_t where) {
    run(AbsMax{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(out), divisor}, where);
  }, Free());
  m.def("float_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr codes, ptr scales, ptr whole, int element, int scaling, int block,
                            bool stochastic, uint64_t seed, uint32_t step, uint32_t stream, int64_t where) {
    run(FloatEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint8_t>(codes), at<void>(scales), at<float>(whole),
                    element, scaling, block, stochastic, seed, step, stream}, where);
  }, Free());
  m.def("float_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr codes, ptr scales, ptr whole, int element,
                                int scaling, int block, int64_t where) {
    run(FloatDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<uint8_t>(codes), at<void>(scales), at<float>(whole), element, scaling, block}, where);
  }, Free());
  m.def("quant_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr codes, ptr scales, int bits, int block, bool stochastic,
                            uint64_t seed, uint32_t step, uint32_t stream, int64_t where) {
    run(QuantEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint8_t>(codes), at<float>(scales), bits, block,
                    stochastic, seed, step, stream}, where);
  }, Free());
  m.def("quant_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr codes, ptr scales, int bits, int block, int64_t where) {
    run(QuantDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<uint8_t>(codes), at<float>(scales), bits, block}, where);
  }, Free());
  m.def("quant_resum", [=](int64_t n, int64_t rows, int64_t stride, ptr row_codes, ptr row_scales, ptr residual, ptr loss_scale, ptr codes, ptr scales, int bits,
                           int block, bool stochastic, uint64_t seed, uint32_t step, uint32_t stream, int64_t where) {
    run(QuantResum{{{nullptr, kFloat32, 1.0f, n, rows, stride}, at<uint8_t>(row_codes), at<float>(row_scales), bits, block},
                   {{nullptr, kFloat32, at<float>(residual), at<float>(loss_scale), n}, at<uint8_t>(codes), at<float>(scales), bits, block,
                    stochastic, seed, step, stream}}, where);
  }, Free());
  m.def("quant_absmax", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr absmax, int block, int64_t where) {
    run(QuantAbsMax{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint32_t>(absmax), block}, where);
  }, Free());
  m.def("quant_encode_shared", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr absmax, ptr codes, int64_t nbytes, int levels, int width,
                                   int block, bool stochastic, uint64_t seed, uint32_t step, uint32_t stream, int64_t where) {
    run(QuantEncodeShared{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint32_t>(absmax), at<uint8_t>(codes), nbytes,
                          levels, width, block, stochastic, seed, step, stream}, where);
  }, Free());
  m.def("quant_decode_shared", [=](ptr out, int dtype, float weight, int64_t n, ptr codes, ptr absmax, int64_t rows, int levels, int width, int block,
                                   bool stochastic, int64_t where) {
    run(QuantDecodeShared{{at<void>(out), dtype, weight, n, rows, 0}, at<uint8_t>(codes), at<uint32_t>(absmax), levels, width, block, stochastic}, where);
  }, Free());
  m.def("ternary_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr codes, ptr scales, int block, bool stochastic,
                              uint64_t seed, uint32_t step, uint32_t stream, int64_t where) {
    run(TernaryEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint8_t>(codes), at<float>(scales), block,
                      stochastic, seed, step, stream}, where);
  }, Free());
  m.def("ternary_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr codes, ptr scales, int block, int64_t where) {
    run(TernaryDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<uint8_t>(codes), at<float>(scales), block}, where);
  }, Free());
  m.def("sign_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr signs, ptr scales, int block, int64_t where) {
    run(SignEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<uint8_t>(signs), at<float>(scales), block}, where);
  }, Free());
  m.def("sign_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr signs, ptr scales, int block, int64_t where) {
    run(SignDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<uint8_t>(signs), at<float>(scales), block}, where);
  }, Free());
  m.def("sign_vote", [=](int64_t n, int64_t rows, int64_t stride, ptr row_signs, ptr row_scales, ptr signs, ptr scales, int block, int64_t where) {
    run(SignVote{{{nullptr, kFloat32, 1.0f, n, rows, stride}, at<uint8_t>(row_signs), at<float>(row_scales), block}, at<uint8_t>(signs), at<float>(scales)}, where);
  }, Free());
  m.def("hadamard_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr rotated, int64_t where) {
    run(HadamardEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(rotated)}, where);
  }, Free());
  m.def("hadamard_keep", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr rotated, int64_t where) {
    run(HadamardKeep{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(rotated)}, where);
  }, Free());
  m.def("hadamard_decode", [=](ptr out, int dtype, float weight, int64_t n, ptr rotated, int64_t where) {
    run(HadamardDecode{at<void>(out), dtype, weight, n, at<float>(rotated)}, where);
  }, Free());
  m.def("topk_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, ptr index, ptr starts, int64_t k, ptr workspace,
                           int64_t workspace_bytes, int64_t where) {
    run(TopkEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(values), at<uint16_t>(index), at<int64_t>(starts), k,
                   at<uint8_t>(workspace), workspace_bytes}, where);
  }, Free());
  m.def("threshold_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, ptr index, ptr starts, int64_t k, ptr control,
                                int64_t begin, ptr workspace, int64_t workspace_bytes, int64_t where) {
    run(ThresholdEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(values), at<uint16_t>(index), at<int64_t>(starts), k,
                        at<int32_t>(control), begin, at<uint8_t>(workspace), workspace_bytes}, where);
  }, Free());
  m.def("topk_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, int64_t place_stride, ptr values, ptr index, ptr starts,
                               int64_t k, int64_t where) {
    run(TopkDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, place_stride, at<float>(values), at<uint16_t>(index), at<int64_t>(starts), k}, where);
  }, Free());
  m.def("sparse_add", [=](ptr residual, ptr loss_scale, int64_t n, ptr values, ptr index, ptr starts, int64_t k, int64_t where) {
    run(SparseAdd{at<float>(residual), at<float>(loss_scale), n, at<float>(values), at<uint16_t>(index), at<int64_t>(starts), k}, where);
  }, Free());
  m.def("blocktopk_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, ptr index, int64_t count, int k, int64_t where) {
    run(BlockTopkEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(values), at<int16_t>(index), count, k}, where);
  }, Free());
  m.def("blocktopk_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, int64_t place_stride, ptr values, ptr index,
                                    int64_t count, int k, int64_t where) {
    run(BlockTopkDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, place_stride, at<float>(values), at<int16_t>(index), count, k}, where);
  }, Free());
  m.def("blocktopk_add", [=](ptr residual, ptr loss_scale, int64_t n, ptr values, ptr index, int64_t count, int k, int64_t where) {
    run(BlockTopkAdd{at<float>(residual), at<float>(loss_scale), n, at<float>(values), at<int16_t>(index), count, k}, where);
  }, Free());
  m.def("bits_pack", [=](ptr index, ptr packed, int64_t count, int width, int64_t where) {
    run(BitsPack{at<int16_t>(index), at<uint8_t>(packed), count, width}, where);
  }, Free());
  m.def("bits_unpack", [=](ptr packed, ptr index, int64_t count, int width, int64_t where) {
    run(BitsUnpack{at<uint8_t>(packed), at<int16_t>(index), count, width}, where);
  }, Free());
  m.def("eliasfano_pack", [=](ptr index, ptr starts, ptr high, int64_t n, int64_t k, int bits, int64_t where) {
    run(EliasFanoPack{at<uint16_t>(index), at<int64_t>(starts), at<uint8_t>(high), n, k, bits}, where);
  }, Free());
  m.def("eliasfano_unpack", [=](ptr high, ptr index, ptr starts, int64_t n, int64_t k, int bits, int64_t where) {
    run(EliasFanoUnpack{at<uint8_t>(high), at<uint16_t>(index), at<int64_t>(starts), n, k, bits}, where);
  }, Free());
  m.def("randomk_encode", [=](ptr x, int dtype, ptr residual, ptr loss_scale, int64_t n, ptr values, int64_t k, bool scaled, uint64_t seed, uint32_t step,
                              uint32_t stream, int64_t where) {
    run(RandomkEncode{{at<void>(x), dtype, at<float>(residual), at<float>(loss_scale), n}, at<float>(values), k, scaled, seed, step, stream}, where);
  }, Free());
  m.def("randomk_decode_sum", [=](ptr out, int dtype, float weight, int64_t n, int64_t rows, int64_t stride, ptr values, int64_t k, uint64_t seed,
                                  uint32_t step, uint32_t stream, int64_t where) {
    run(RandomkDecodeSum{{at<void>(out), dtype, weight, n, rows, stride}, at<float>(values), k, seed, step, stream}, where);
  }, Free());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of commopt. Call them through commopt.backends, which checks the arguments.";

  auto cpu = m.def_submodule("cpu");
  bind_ops(cpu, [](const auto& op, int64_t threads) { commopt::cpu::run(op, (int)threads); });
  cpu.def("topk_workspace", &commopt::cpu::topk_workspace);
  cpu.def("threshold_workspace", &commopt::cpu::threshold_workspace);
  cpu.def("axpy", [](ptr r, ptr g, int64_t n, int threads) { commopt::cpu::axpy(at<float>(r), at<float>(g), n, threads); });
  cpu.def("isas", &commopt::cpu::isas, "instruction sets this machine runs, mildest first");
  cpu.def("isa", &commopt::cpu::isa, "the one in use");
  cpu.def("use_isa", &commopt::cpu::use_isa, "force one; ValueError names those that run here");

#ifdef COMMOPT_CUDA
  auto cuda = m.def_submodule("cuda");
  bind_ops(cuda, [](const auto& op, int64_t stream) { commopt::cuda::run(op, reinterpret_cast<cudaStream_t>(stream)); });
  cuda.def("topk_workspace", &commopt::cuda::topk_workspace);
  cuda.def("threshold_workspace", &commopt::cuda::threshold_workspace);
  cuda.attr("archs") = COMMOPT_CUDA;
  cuda.attr("runtime") = CUDART_VERSION;
#endif
}

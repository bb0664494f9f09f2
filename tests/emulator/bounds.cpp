// Calls every op with buffers of exactly the size it may touch, for AddressSanitizer to watch.
// Its arguments: the gradient's dtype, 0 to 2; and "overrun", with which one buffer is a value too short, and this program has to be
// stopped.
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/run.h"

using namespace commopt;

namespace {

std::mt19937 draw(1);

template <class T> struct Exact {  // a heap block without slack, starting `skip` elements off alignment
  std::vector<T> held;
  size_t skip;
  explicit Exact(int64_t count, size_t skip = 0) : held((size_t)(count < 0 ? 0 : count) + skip), skip(skip) {}
  T* data() { return held.data() + skip; }
};

struct Gradient {
  int dtype;
  Exact<uint8_t> x;
  Exact<float> residual;
  float loss_scale = 1024.0f;
  int64_t n;

  Gradient(int dtype, int64_t n, size_t skip)
      : dtype(dtype), x(n * (dtype ? 2 : 4), skip * (dtype ? 2 : 4)), residual(n, skip), n(n) {
    for (auto& byte : x.held) byte = (uint8_t)draw();  // NaN and infinity among them
    for (auto& r : residual.held) r = (float)(int)draw() * 1e-9f;
  }
  Input input() { return {x.data(), dtype, residual.data(), &loss_scale, n}; }
  Output output(int64_t stride) { return {x.data(), dtype, 0.5f, n, 2, stride}; }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last row has no gap behind it, the one before a gap of 16 bytes.
int64_t stride_of(int64_t bytes) { return ceil_div(bytes, 16) * 16 + 16; }

template <class T> struct Field {  // of two rows
  int64_t stride;
  Exact<uint8_t> bytes;
  Field(int64_t count, int64_t stride) : stride(stride), bytes(stride + count * (int64_t)sizeof(T)) {
    for (auto& b : bytes.held) b = (uint8_t)draw();
  }
  T* row(int i = 0) { return reinterpret_cast<T*>(bytes.data() + i * stride); }
};

void all(int dtype, int64_t n, size_t skip, int64_t short_by) {
  Gradient g(dtype, n, skip);
  for (int values = 0; values < 2; ++values) {
    int64_t size = values ? 2 : 4, stride = stride_of(n * size);
    Field<uint8_t> v(n * size - short_by, stride);
    cuda::run(DenseEncode{g.input(), v.row(1), values}, nullptr);
    cuda::run(DenseDecodeSum{g.output(stride), v.row(), values}, nullptr);
  }
  for (int block : {64, 256, 1024, 24}) {
    int64_t blocks = ceil_div(n, block), stride = stride_of(n * 4);
    Field<float> scales(blocks, stride);
    Field<uint16_t> v(n, stride);
    cuda::run(HalfEncode{g.input(), v.row(1), scales.row(1), block}, nullptr);
    cuda::run(HalfDecodeSum{g.output(stride), v.row(), scales.row(), block}, nullptr);
    for (int format : {(int)kE4M3, 10 + kE5M2, 10 + kE2M1, 20 + kE2M1, 10 + kPower}) {
      const int element = format % 10, scaling = format / 10;
      Field<uint8_t> codes(element == kE2M1 ? ceil_div(n, 2) : n, stride), coded(scaling ? blocks : 4 * blocks, stride);
      Field<float> whole(1, stride);
      cuda::run(AbsMax{g.input(), whole.row(1), 2688.0f}, nullptr);
      cuda::run(FloatEncode{g.input(), codes.row(1), coded.row(1), whole.row(1), element, scaling, block, element == kPower, 1, 2, 3}, nullptr);
      cuda::run(FloatDecodeSum{g.output(stride), codes.row(), coded.row(), whole.row(), element, scaling, block}, nullptr);
    }
    for (int bits : {8, 4, 2}) {
      Field<uint8_t> codes(ceil_div(n * bits, 8), stride);
      cuda::run(QuantEncode{g.input(), codes.row(1), scales.row(1), bits, block, bits == 4, 1, 2, 3}, nullptr);
      QuantDecodeSum sum{g.output(stride), codes.row(), scales.row(), bits, block};
      cuda::run(sum, nullptr);
      Field<float> resent(blocks, stride);
      Field<uint8_t> recoded(ceil_div(n * bits, 8), stride);
      cuda::run(QuantResum{sum, {g.input(), recoded.row(1), resent.row(1), bits, block, bits == 4, 1, 2, 3}}, nullptr);
    }
  }
  for (int block : {64, 1024, 24}) {
    Exact<uint32_t> absmax(ceil_div(n, block));
    cuda::run(QuantAbsMax{g.input(), absmax.data(), block}, nullptr);
    for (int width : {4, 8, 16}) {
      Exact<uint8_t> codes(ceil_div(n * width, 32) * 4);
      cuda::run(QuantEncodeShared{g.input(), absmax.data(), codes.data(), (int64_t)codes.held.size(), 7, width, block, block == 64, 1, 2, 3}, nullptr);
      Output out = g.output(0);
      cuda::run(QuantDecodeShared{out, codes.data(), absmax.data(), 7, width, block, block == 64}, nullptr);
    }
  }
  for (int block : {40, 320}) {
    int64_t blocks = ceil_div(n, block), stride = stride_of(blocks * block);
    Field<float> scales(blocks, stride);
    Field<uint8_t> codes(blocks * block / 5, stride);
    cuda::run(TernaryEncode{g.input(), codes.row(1), scales.row(1), block, block == 40, 1, 2, 3}, nullptr);
    cuda::run(TernaryDecodeSum{g.output(stride), codes.row(), scales.row(), block}, nullptr);
  }
  for (int block : {64, 1024, 24}) {
    int64_t blocks = ceil_div(n, block), stride = stride_of(blocks * 4 + n);
    Field<float> scales(blocks, stride);
    Field<uint8_t> signs(ceil_div(n, 8), stride);
    cuda::run(SignEncode{g.input(), signs.row(1), scales.row(1), block}, nullptr);
    SignDecodeSum sum{g.output(stride), signs.row(), scales.row(), block};
    cuda::run(sum, nullptr);
    Exact<uint8_t> voted(ceil_div(n, 8));
    Exact<float> total(blocks);
    cuda::run(SignVote{sum, voted.data(), total.data()}, nullptr);
  }
  Exact<float> rotated(n, skip);
  cuda::run(HadamardEncode{g.input(), rotated.data()}, nullptr);
  cuda::run(HadamardKeep{g.input(), rotated.data()}, nullptr);
  cuda::run(HadamardDecode{g.x.data(), dtype, 0.5f, n, rotated.data()}, nullptr);
  for (int64_t k : {(int64_t)0, n ? (int64_t)1 : 0, n / 10, n}) {
    int64_t tiles = ceil_div(n, kTile), stride = stride_of(8 * (k + tiles));
    Field<float> values(k, stride);
    Field<uint16_t> index(k, stride);
    Field<int64_t> starts(tiles, stride);
    // Rows of random bytes: no message may make a decoder leave its output.
    cuda::run(TopkDecodeSum{g.output(stride), stride, values.row(), index.row(), starts.row(), k}, nullptr);
    cuda::run(SparseAdd{g.residual.data(), &g.loss_scale, n, values.row(), index.row(), starts.row(), k}, nullptr);
    Exact<uint8_t> workspace(cuda::topk_workspace(n, k));
    for (int call = 0; call < 4; ++call) {
      g.loss_scale = call == 2 ? 1.0f : 1024.0f;
      cuda::run(TopkEncode{g.input(), values.row(1), index.row(1), starts.row(1), k, workspace.data(), (int64_t)workspace.held.size()}, nullptr);
    }
    cuda::run(TopkDecodeSum{g.output(stride), stride, values.row(), index.row(), starts.row(), k}, nullptr);
    Exact<uint8_t> scratch(cuda::threshold_workspace(n, k));
    Exact<int32_t> control(2);
    for (int call = 0; call < 3; ++call)
      cuda::run(ThresholdEncode{g.input(), values.row(1), index.row(1), starts.row(1), k, control.data(), n / 3, scratch.data(), (int64_t)scratch.held.size()}, nullptr);
    for (int bits : {1, 6, 13, 16}) {
      Exact<uint8_t> low(ceil_div(k * bits, 8), skip), high(ceil_div(k + (n >> bits), 8), skip);
      cuda::run(BitsPack{reinterpret_cast<int16_t*>(index.row(1)), low.data(), k, bits}, nullptr);
      // Of the encoder's list and of one in no order.
      for (int row : {1, 0}) cuda::run(EliasFanoPack{index.row(row), starts.row(row), high.data(), n, k, bits}, nullptr);
      Exact<uint16_t> again(k, skip);
      Exact<int64_t> begin(tiles);
      for (auto& byte : high.held) byte = (uint8_t)draw();
      cuda::run(BitsUnpack{low.data(), reinterpret_cast<int16_t*>(again.data()), k, bits}, nullptr);
      cuda::run(EliasFanoUnpack{high.data(), again.data(), begin.data(), n, k, bits}, nullptr);
    }
    if (k == 0) continue;
    cuda::run(RandomkEncode{g.input(), values.row(1), k, k % 2 == 0, 1, 2, 3}, nullptr);
    cuda::run(RandomkDecodeSum{g.output(stride), values.row(), k, 1, 2, 3}, nullptr);
  }
  for (int k : {0, 10, 1024}) {
    int64_t count = n / kBlock * k + ceil_div(n % kBlock * k, kBlock), stride = stride_of(4 * count);
    Field<float> values(count, stride);
    Field<int16_t> index(count, stride);
    for (int row = 0; row < 2; ++row)  // indices that may be, but for their order, beside those that may not
      for (int64_t i = row; i < count; i += 2) index.row(row)[i] = (int16_t)(draw() % 1100);
    BlockTopkDecodeSum sum{g.output(stride), stride, values.row(), index.row(), count, k};
    cuda::run(sum, nullptr);
    cuda::run(BlockTopkAdd{g.residual.data(), &g.loss_scale, n, values.row(), index.row(), count, k}, nullptr);
    cuda::run(BlockTopkEncode{g.input(), values.row(1), index.row(1), count, k}, nullptr);
    cuda::run(sum, nullptr);
  }
}

}  // namespace

int main(int count, char** arguments) {
  for (int64_t n : {0, 7, 65, 5000}) all(atoi(arguments[1]), n, (size_t)(n % 3), count > 2 && n ? 1 : 0);
  puts("clean");
}

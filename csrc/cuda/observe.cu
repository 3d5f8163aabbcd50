// Min/max statistics, and quantization parameters from them.
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

constexpr int kChannelThreads = 128;

template <class B>
__global__ void __launch_bounds__(kChannelThreads)
    choose_channels(const Statistics statistics, const Flag enabled, const int64_t channels) {
  const int64_t channel = int64_t{blockIdx.x} * kChannelThreads + threadIdx.x;
  if (channel >= channels || !is_on(enabled)) return;
  choose_channel<B>(statistics, channel,
                    {read<B>(statistics.min_val, channel), read<B>(statistics.max_val, channel)});
}

void choose(Launcher& launcher, const Statistics& statistics, Flag enabled, int64_t channels) {
  const int64_t blocks = (channels + kChannelThreads - 1) / kChannelThreads;
  const auto kernel =
      statistics.min_val.type == Element::f64 ? choose_channels<double> : choose_channels<float>;
  launch(launcher, kernel, blocks, kChannelThreads, 0, statistics, enabled, channels);
}

}  // namespace

MinMaxArgs minmax_args(const Dense& x, Flag enabled, const ObserveBuffers& buffers,
                       std::optional<double> averaging_constant, NonFinite policy) {
  check_count(buffers.min_val, x.channels);
  check_count(buffers.max_val, x.channels);
  MinMaxArgs args = {};
  args.x = x.data;
  args.enabled = enabled;
  args.keeps_infinite = args.keeps_nan = policy == NonFinite::propagate;
  if (policy != NonFinite::propagate) args.left_out = static_cast<int64_t*>(buffers.nonfinite_count.data);
  args.updates = true;
  args.in_double = buffers.min_val.type == Element::f64;
  args.statistics.min_val = Buffer(buffers.min_val);
  args.statistics.max_val = Buffer(buffers.max_val);
  args.statistics.averages = averaging_constant.has_value();
  args.statistics.constant = averaging_constant.value_or(0.0);
  return args;
}

MinMaxArgs counting_args(const Dense& x, Flag enabled, int64_t* left_out) {
  MinMaxArgs args = {};
  args.x = x.data;
  args.enabled = enabled;
  args.left_out = left_out;
  return args;
}

void reduce_minmax(Launcher& launcher, const Dense& x, const MinMaxArgs& args) {
  with_stored_type(x.type, [&](auto stored) {
    reduce_channels<MinMax, decltype(stored), 1024>(launcher, x, {x.data}, args);
  });
}

void add_qparams(const QParamBuffers& qparams, const QParamsConfig& config, Statistics* statistics) {
  statistics->scale = Buffer(qparams.scale);
  statistics->zero_point = Buffer(qparams.zero_point);
  statistics->eps = Buffer(qparams.eps);
  statistics->config = config;
}

void refuse_counted(Launcher& launcher, const std::function<void(int64_t* left_out)>& count) {
  check(!launcher.is_capturing(), "nonfinite=1 (raise) waits for the device, which a CUDA graph cannot");
  auto* left_out = static_cast<int64_t*>(launcher.scratch(sizeof(int64_t)));
  check_cuda(cudaMemsetAsync(left_out, 0, sizeof(int64_t), launcher.stream()));
  count(left_out);
  int64_t counted = 0;
  check_cuda(cudaMemcpyAsync(&counted, left_out, sizeof counted, cudaMemcpyDeviceToHost, launcher.stream()));
  check_cuda(cudaStreamSynchronize(launcher.stream()));
  if (counted > 0) throw NonfiniteElements(counted);
}

void refuse_nonfinite(Launcher& launcher, const Dense& x, Flag enabled) {
  const Dense whole = {x.data, x.type, 1, 1, x.numel()};
  refuse_counted(launcher, [&](int64_t* left_out) {
    reduce_minmax(launcher, whole, counting_args(whole, enabled, left_out));
  });
}

void observe_minmax(Launcher& launcher, const Dense& x, const ObserveBuffers& buffers,
                    std::optional<double> averaging_constant, NonFinite policy) {
  if (x.numel() == 0) return;
  const MinMaxArgs args = minmax_args(x, Flag(), buffers, averaging_constant, policy);
  if (policy == NonFinite::raise) refuse_nonfinite(launcher, x, Flag());
  reduce_minmax(launcher, x, args);
}

void observe_qparams(Launcher& launcher, const Dense& x, Flag enabled, const ObserveBuffers& buffers,
                     const QParamBuffers& qparams, std::optional<double> averaging_constant,
                     const QParamsConfig& config, NonFinite policy) {
  const int64_t channels = buffers.min_val.numel;
  for (const Array& a : {buffers.max_val, qparams.scale, qparams.zero_point}) check_count(a, channels);
  if (x.numel() == 0) {
    Statistics statistics = {};
    statistics.min_val = Buffer(buffers.min_val);
    statistics.max_val = Buffer(buffers.max_val);
    add_qparams(qparams, config, &statistics);
    choose(launcher, statistics, enabled, channels);
    return;
  }
  MinMaxArgs args = minmax_args(x, enabled, buffers, averaging_constant, policy);
  add_qparams(qparams, config, &args.statistics);
  if (policy == NonFinite::raise) refuse_nonfinite(launcher, x, enabled);
  reduce_minmax(launcher, x, args);
}

void choose_qparams(Launcher& launcher, const Array& min_val, const Array& max_val,
                    const QParamBuffers& qparams, const QParamsConfig& config) {
  for (const Array& a : {max_val, qparams.scale, qparams.zero_point}) check_count(a, min_val.numel);
  Statistics statistics = {};
  statistics.min_val = Buffer(min_val);
  statistics.max_val = Buffer(max_val);
  add_qparams(qparams, config, &statistics);
  choose(launcher, statistics, Flag(), min_val.numel);
}

}  // namespace fastquant::cuda

// The simulated cards' process group: gloo on the same memory, with what HCCL refuses.
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>

namespace simulated {

namespace {

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using Work = c10::intrusive_ptr<c10d::Work>;

at::Tensor shared(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == c10::DeviceType::PrivateUse1, "simulated hccl: a tensor on ", tensor.device(),
              "; HCCL takes tensors of cards (No backend type associated with device type cpu)");
  const auto dtype = tensor.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kChar ||
                     dtype == at::kByte || dtype == at::kShort || dtype == at::kInt || dtype == at::kLong ||
                     dtype == at::kBool;
  TORCH_CHECK(known, "simulated hccl: HCCL has no ", dtype, " (EI0003 invalid dataType)");
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [kept = tensor](void*) {},
                       at::TensorOptions().dtype(dtype));
}

Tensors shared(const Tensors& tensors) {
  Tensors out;
  for (const auto& tensor : tensors) out.push_back(shared(tensor));
  return out;
}

Lists shared(const Lists& lists) {
  Lists out;
  for (const auto& list : lists) out.push_back(shared(list));
  return out;
}

class Hccl final : public c10d::Backend {
 public:
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "hccl"; }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = shared(tensors);
    return gloo_->broadcast(host, options);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto host = shared(tensors);
    return divided(gloo_->allreduce(host, without_mean(options)), options.reduceOp, host);
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto host = shared(tensors);
    return divided(gloo_->reduce(host, without_mean(options)), options.reduceOp, host);
  }
  Work allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto out = shared(outputs);
    auto in = shared(inputs);
    return gloo_->allgather(out, in, options);
  }
  // Of these only the numbers of elements have to fit.
  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto out = shared(output).view(-1);
    auto in = shared(input).view(-1);
    return gloo_->_allgather_base(out, in, options);
  }
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override {
    auto out = shared(outputs);
    auto in = shared(inputs);
    return gloo_->allgather_into_tensor_coalesced(out, in, options);
  }
  Work gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto out = shared(outputs);
    auto in = shared(inputs);
    return gloo_->gather(out, in, options);
  }
  Work scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    auto out = shared(outputs);
    auto in = shared(inputs);
    return gloo_->scatter(out, in, options);
  }
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto out = shared(output).view(-1);
    auto in = shared(input).view(-1);
    return divided(gloo_->_reduce_scatter_base(out, in, without_mean(options)), options.reduceOp, {out});
  }
  Work alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_split,
                     std::vector<int64_t>& input_split, const c10d::AllToAllOptions& options) override {
    auto out = shared(output);
    auto in = shared(input);
    return gloo_->alltoall_base(out, in, output_split, input_split, options);
  }
  Work send(Tensors& tensors, int to, int tag) override {
    auto host = shared(tensors);
    return gloo_->send(host, to, tag);
  }
  Work recv(Tensors& tensors, int from, int tag) override {
    auto host = shared(tensors);
    return gloo_->recv(host, from, tag);
  }
  Work barrier(const c10d::BarrierOptions& options) override {
    auto on_cpu = options;
    on_cpu.device = std::nullopt;
    return gloo_->barrier(on_cpu);
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;

  // HCCL has no mean: torch_npu adds and then divides.
  template <class Options>
  static Options without_mean(Options options) {
    if (options.reduceOp == c10d::ReduceOp::AVG) options.reduceOp = c10d::ReduceOp::SUM;
    return options;
  }
  Work divided(Work work, const c10d::ReduceOp& op, const Tensors& tensors) {
    if (op == c10d::ReduceOp::AVG) {
      work->wait();
      for (auto tensor : tensors) tensor.div_(getSize());
    }
    return work;
  }
};

}  // namespace

void bind_hccl(pybind11::module_& module) {
  pybind11::class_<Hccl, c10d::Backend, c10::intrusive_ptr<Hccl>>(module, "Hccl")
      .def(pybind11::init([](const c10::intrusive_ptr<c10d::Backend>& gloo) { return c10::make_intrusive<Hccl>(gloo); }));
}

}  // namespace simulated

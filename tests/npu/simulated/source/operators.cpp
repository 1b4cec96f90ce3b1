// What runs on a simulated card: a few operators of its own, for all others those of the CPU, after checks that an
// Ascend card would fail.
#include "card.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/repeat_interleave_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <unordered_set>

namespace simulated {

at::Generator host_generator(const std::optional<at::Generator>& given, c10::DeviceIndex card);

namespace {

using at::Tensor;

bool on_card(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1; }

// ---- what is refused

void check_dtype(at::ScalarType dtype, const std::string& where) {
  const bool refused = at::isFloat8Type(dtype) || dtype == at::kUInt64 || dtype == at::kUInt32 || dtype == at::kUInt16;
  TORCH_CHECK(!refused, "simulated npu: ", where, " does not support ", dtype, " (EZ1001 aclnn: dtype not supported)");
}

bool is_one_of(const std::string& name, const std::unordered_set<std::string>& names) {
  // "aten::sum" and, in place, "aten::cumsum_"
  const auto bare = name.substr(name.find("::") + 2);
  return names.count(bare) > 0 || (bare.back() == '_' && names.count(bare.substr(0, bare.size() - 1)) > 0);
}

// Matrix products and reductions have no float64 kernel on Atlas A2.
const std::unordered_set<std::string> no_float64 = {
    "mm",       "bmm",      "addmm",    "baddbmm",            "addbmm",       "mv",           "addmv",
    "dot",      "vdot",     "addr",     "sum",                "nansum",       "mean",         "prod",
    "var",      "std",      "var_mean", "std_mean",           "norm",         "cumsum",       "cumprod",
    "softmax",  "_softmax", "logsumexp", "linalg_vector_norm", "log_softmax", "_log_softmax", "_foreach_norm",
    "cholesky", "bincount", "index_add", "linalg_cholesky_ex", "scatter_add", "triangular_solve",
    "native_layer_norm", "linalg_solve_triangular"};

// Matrix factorisations that are not there in any dtype.
const std::unordered_set<std::string> not_there = {
    "_linalg_eigh",     "linalg_eigh",     "linalg_eig",   "cholesky_solve", "_cholesky_solve_helper",
    "cholesky_inverse", "_linalg_solve_ex", "linalg_lstsq", "_linalg_svd",    "linalg_lu_factor_ex",
    "linalg_lu"};

// Done by a loop on the host that waits for the card at every index, unless CANN is new.
const std::unordered_set<std::string> one_by_one = {"index_copy"};

struct Checked {
  const std::string name;
  std::optional<Tensor> first = std::nullopt;  // of those on a card

  void tensor(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!on_card(tensor)) {
      // A number in a tensor of the CPU may stand beside tensors of a card.
      if (tensor.dim() > 0) host = tensor;
      return;
    }
    check_dtype(tensor.scalar_type(), name);
    TORCH_CHECK(!first || first->device() == tensor.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", first->device(),
                " and ", tensor.device(), "! (", name, ")");
    TORCH_CHECK(tensor.scalar_type() != at::kDouble || !is_one_of(name, no_float64), "simulated npu: ", name,
                " does not support DT_DOUBLE (EZ1001 aclnn: dtype not supported)");
    first = first ? first : tensor;
  }
  void value(const c10::IValue& value) {
    if (value.isTensor()) {
      tensor(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& each : value.toListRef()) this->value(each);
    }
  }
  void end() const {
    TORCH_CHECK(!(first && host), "Expected all tensors to be on the same device, but found at least two devices, ",
                first->device(), " and cpu! (", name, ")");
  }
  std::optional<Tensor> host = std::nullopt;
};

// ---- the fallback

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK(!is_one_of(schema.name(), not_there), "simulated npu: ", schema.name(), " is not there");
  TORCH_CHECK(!is_one_of(schema.name(), one_by_one), "simulated npu: ", schema.name(),
              " waits for the card at every index");
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  Checked checked{schema.name()};
  std::optional<c10::Device> asked;
  for (size_t index = 0; index < count; ++index) {
    const auto& value = (*stack)[begin + index];
    checked.value(value);
    if (value.isDevice()) asked = value.toDevice();
  }
  checked.end();
  c10::DeviceIndex card = checked.first ? checked.first->device().index()
                          : asked && asked->has_index() ? asked->index() : current_card();
  current_card();  // this thread has one
  for (size_t index = 0; index < count; ++index) {
    const auto& type = *schema.arguments()[index].type();
    auto& value = (*stack)[begin + index];
    const bool random = type.isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()));
    if (random) value = host_generator(value.toOptional<at::Generator>(), card);
  }
  ++cards[card].kernels;
  at::native::cpu_fallback(op, stack);
}

// ---- memory

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type, "aten::empty");
  const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_generic(size, c10::GetAllocator(c10::DeviceType::PrivateUse1),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  check_dtype(type, "aten::empty_strided");
  const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(c10::DeviceType::PrivateUse1),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const auto bytes = size_t(impl->storage_offset() + self.numel()) * self.itemsize();
  if (bytes > impl->unsafe_storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(impl->unsafe_storage(), bytes);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) { return at::native::set_(self, std::move(source)); }

Tensor& set_nothing(Tensor& self) {
  at::Storage none(at::Storage::use_byte_size_t(), 0, c10::GetAllocator(c10::DeviceType::PrivateUse1), true);
  return self.set_(none, 0, {0}, {});
}

// ---- copies

// The same memory as a tensor of the CPU.
Tensor as_host(const Tensor& tensor) {
  if (!on_card(tensor)) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [kept = tensor](void*) {},
                       at::TensorOptions().dtype(tensor.scalar_type()));
}

Tensor copy_between(const Tensor& from, const Tensor& to, bool without_waiting) {
  check_dtype(from.scalar_type(), "aten::copy_");
  check_dtype(to.scalar_type(), "aten::copy_");
  const c10::DeviceIndex card = on_card(from) ? from.device().index() : to.device().index();
  ++cards[card].kernels;
  if (without_waiting && on_card(from) && !on_card(to) && to.is_pinned()) {
    const bool same = to.is_contiguous() && from.scalar_type() == to.scalar_type();
    TORCH_CHECK(same, "simulated npu: a copy that is not waited for needs memory of the same dtype, in one piece");
    auto value = as_host(from).clone();
    std::memset(to.data_ptr(), 0xFF, to.nbytes());
    defer(card, [value, to] { to.copy_(value); });
    return to;
  }
  if (!on_card(to)) finish_copies(card, current_stream(card));
  as_host(to).copy_(as_host(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_between(from, to, false);
}

at::Scalar number(const Tensor& self) {
  const auto card = self.device().index();
  finish_copies(card, current_stream(card));
  return at::_local_scalar_dense(as_host(self));
}

void record_stream(Tensor&, at::Stream) {}

// ---- operators with limits of their own

// Documented for outputs below 2^22 elements.
void check_repeated(const Tensor& out) {
  TORCH_CHECK(out.numel() < (int64_t(1) << 22), "simulated npu: repeat_interleave of ", out.numel(),
              " elements; aclnnRepeatInterleave takes outputs below 2^22");
}

Tensor repeat_by_number(const Tensor& self, c10::SymInt repeats, std::optional<int64_t> dim,
                        std::optional<c10::SymInt> size) {
  auto out = at::native::repeat_interleave_symint(self, std::move(repeats), dim, std::move(size));
  check_repeated(out);
  return out;
}

Tensor repeat_by_tensor(const Tensor& self, const Tensor& repeats, std::optional<int64_t> dim,
                        std::optional<c10::SymInt> size) {
  auto out = at::native::repeat_interleave_symint(self, repeats, dim, std::move(size));
  check_repeated(out);
  return out;
}

// The fused kernel takes boolean masks and heads of up to 512, and groups of heads as they are. What it does not take
// is computed step by step, and there enable_gqa is dropped.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double dropout, bool causal, std::optional<double> scale, bool grouped) {
  const bool masked = mask.has_value() && mask->defined();
  TORCH_CHECK(!(masked && causal), "simulated npu: is_causal takes no mask");
  const bool fused = (!masked || mask->scalar_type() == at::kBool) && query.size(-1) <= 512;
  TORCH_CHECK(fused || !grouped, "simulated npu: scaled_dot_product_attention drops enable_gqa here; repeat the heads");
  std::optional<Tensor> bias = mask;
  if (masked && mask->scalar_type() == at::kBool) {  // which the formula below would add as 0 and 1
    bias = at::zeros(mask->sizes(), query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, bias, dropout, causal, std::nullopt, scale,
                                                            grouped));
}

// Of equal values the last comes first, which is another order than that of CPUs and GPUs.
std::tuple<Tensor, Tensor> topk(const Tensor& self, c10::SymInt k, int64_t dim, bool largest, bool sorted) {
  Checked checked{"aten::topk"};
  checked.tensor(self);
  ++cards[self.device().index()].kernels;
  auto [values, places] = as_host(self).flip({dim}).sort(/*stable=*/true, dim, /*descending=*/largest);
  places = self.size(dim) - 1 - places;
  const auto count = k.expect_int();
  TORCH_CHECK(count >= 0 && count <= self.size(dim), "selected index k out of range");
  return {values.narrow(dim, 0, count).to(self.device()), places.narrow(dim, 0, count).to(self.device())};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("set_", &set_nothing);
  library.impl("_copy_from", &copy_between);
  library.impl("_copy_from_and_resize", &copy_and_resize);
  library.impl("_local_scalar_dense", &number);
  library.impl("record_stream", &record_stream);
  library.impl("topk", &topk);
  library.impl("repeat_interleave.self_int", &repeat_by_number);
  library.impl("repeat_interleave.self_Tensor", &repeat_by_tensor);
  library.impl("scaled_dot_product_attention", &attention);
}

// These three are made of other operators, which have the derivatives.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  library.impl("repeat_interleave.self_int", &repeat_by_number);
  library.impl("repeat_interleave.self_Tensor", &repeat_by_tensor);
  library.impl("scaled_dot_product_attention", &attention);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#undef LOWER
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FULL)
#undef FULL
}

}  // namespace simulated

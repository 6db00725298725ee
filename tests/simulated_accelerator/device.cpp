// A second device whose memory is host memory, counted to the byte (torch's PrivateUse1 backend).
//
// Every storage of the device owns, as the context of its data pointer, a CPU storage over the same bytes. An op
// runs as the CPU's own kernel on CPU tensors over those storages, and what the kernel allocates meanwhile, outputs
// and temporaries alike, is charged to the device. So numbers, views and memory are those of the CPU run.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/AllocatorConfig.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/llvmMathExtras.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <thread>

namespace {

using at::Tensor;

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet kDeviceKey(c10::DispatchKey::PrivateUse1), kCpuKey(c10::DispatchKey::CPU);
constexpr size_t kNoCap = std::numeric_limits<size_t>::max();

// ---- memory ----

// Blocks of host memory with their sizes in bytes, the sum of them, its peak, and the sum of all there have been.
class CountedMemory {
 public:
  c10::DataPtr allocate(size_t bytes, c10::DeleterFnPtr deleter) {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    std::lock_guard<std::mutex> lock(mutex_);
    const bool fits = current <= cap && bytes <= cap - current;
    TORCH_CHECK_WITH(OutOfMemoryError, fits, "sim out of memory: tried to allocate ", bytes, " bytes with ", current,
                     " of ", cap, " bytes in use");
    void* block = c10::alloc_cpu(bytes);
    sizes_.emplace(block, bytes);
    current += bytes;
    allocated += bytes;
    peak = std::max(peak, current);
    return {block, block, deleter, c10::Device(c10::kCPU)};
  }

  bool release(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = sizes_.find(block);
    if (found == sizes_.end()) return false;
    current -= found->second;
    sizes_.erase(found);
    c10::free_cpu(block);
    return true;
  }

  bool owns(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = sizes_.upper_bound(const_cast<void*>(data));
    if (after == sizes_.begin()) return false;
    const auto& [block, bytes] = *std::prev(after);
    return data < static_cast<const char*>(block) + bytes;
  }

  size_t current = 0, peak = 0, allocated = 0, cap = kNoCap;

 private:
  std::mutex mutex_;
  std::map<void*, size_t> sizes_;
};

// Never destroyed: tensors may outlive this library's static objects.
CountedMemory& device_memory = *new CountedMemory;
CountedMemory& pinned_memory = *new CountedMemory;
std::atomic<size_t> host_to_device{0}, device_to_host{0}, scalars_read{0};

thread_local bool charge_device = false;

struct ChargeDevice {
  explicit ChargeDevice(bool charge = true) : before(std::exchange(charge_device, charge)) {}
  ~ChargeDevice() { charge_device = before; }
  const bool before;
};

// Takes the place of the CPU's allocator and hands everything on to it, except while a CPU kernel works for the device.
struct HostAllocator final : c10::Allocator {
  c10::Allocator* original = c10::GetAllocator(c10::kCPU);
  c10::DataPtr allocate(size_t bytes) override {
    return charge_device ? device_memory.allocate(bytes, &release) : original->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static void release(void* block);
};
HostAllocator& host_allocator = *new HostAllocator;

void HostAllocator::release(void* block) {
  if (!device_memory.release(block)) host_allocator.original->raw_deallocate(block);
}

// Rounds as torch's own allocator of pinned memory does (ATen/core/CachingHostAllocator.h).
struct PinnedAllocator final : c10::Allocator {
  static size_t rounded(size_t bytes) {
    const size_t threshold = c10::CachingAllocator::AcceleratorAllocatorConfig::pinned_max_round_threshold();
    return bytes > 0 && bytes <= threshold ? c10::llvm::PowerOf2Ceil(bytes) : bytes;
  }
  c10::DataPtr allocate(size_t bytes) override {
    return pinned_memory.allocate(rounded(bytes), [](void* block) { pinned_memory.release(block); });
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator& pinned_allocator = *new PinnedAllocator;

c10::Storage make_storage(size_t bytes, c10::DataPtr data, c10::Allocator& allocator) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), &allocator,
                                               /*resizable=*/true);
}

c10::DataPtr device_pointer(c10::Storage on_cpu) {
  void* data = on_cpu.mutable_data();
  auto release = [](void* owned) {
    c10::intrusive_ptr<c10::StorageImpl>::reclaim(static_cast<c10::StorageImpl*>(owned));
  };
  return {data, on_cpu.unsafeReleaseStorageImpl(), release, kDevice};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    ChargeDevice charge;
    return device_pointer(make_storage(bytes, host_allocator.allocate(bytes), host_allocator));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
DeviceAllocator& device_allocator = *new DeviceAllocator;

c10::Storage device_storage(const c10::Storage& on_cpu) {
  TORCH_CHECK(!on_cpu.data() || device_memory.owns(on_cpu.data()), "a CPU kernel returned memory that was not counted");
  return make_storage(on_cpu.nbytes(), device_pointer(on_cpu), device_allocator);
}

// ---- CPU tensors over the device's memory ----

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.is_privateuseone(); }

c10::StorageImpl* cpu_storage(const Tensor& tensor) {
  return static_cast<c10::StorageImpl*>(tensor.storage().data_ptr().get_context());
}

Tensor tensor_over(c10::Storage storage, const Tensor& like, c10::DispatchKeySet key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), key, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

Tensor as_cpu(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  TORCH_CHECK(cpu_storage(tensor), "a sim tensor's memory does not come from the sim allocator");
  auto storage = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu_storage(tensor));
  return tensor_over(std::move(storage), tensor, kCpuKey);
}

// Carries over what a kernel did to the shape or the storage of a tensor that it was allowed to write to.
void write_back(const Tensor& tensor, const Tensor& alias) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const auto& changed = alias.storage();
  if (changed.unsafeGetStorageImpl() != cpu_storage(tensor)) {
    impl->set_storage_keep_dtype(device_storage(changed));
  } else if (changed.data() != tensor.storage().data() || changed.nbytes() != tensor.storage().nbytes()) {
    tensor.storage().set_data_ptr_noswap(device_pointer(changed));
    tensor.storage().set_nbytes(changed.nbytes());
  }
  if (alias.sizes() != impl->sizes() || alias.strides() != impl->strides() ||
      alias.storage_offset() != impl->storage_offset()) {
    impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }
}

// Operators take CPU tensors beside the device's only as scalars, and where torch moves indices by itself.
void check_devices(const c10::OperatorHandle& op, const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0) return;
  const auto& name = op.operator_name().name;
  TORCH_CHECK(name.find("index") != std::string::npos, name,
              ": expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu");
  host_to_device += tensor.nbytes();
}

// The autograd thread keeps the number of threads of its birth; sums must be split as on the main thread.
void follow_main_thread() {
  static std::atomic<int> wanted{at::get_num_threads()};
  static const auto main_thread = std::this_thread::get_id();
  if (std::this_thread::get_id() == main_thread) {
    wanted = at::get_num_threads();
  } else if (at::get_num_threads() != wanted) {
    at::set_num_threads(wanted);
  }
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first_argument = stack->size() - schema.arguments().size();
  struct Pair {
    Tensor device, cpu;
    bool writable;
  };
  c10::SmallVector<Pair, 8> pairs;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    c10::IValue& value = (*stack)[first_argument + i];
    const auto* alias_info = schema.arguments()[i].alias_info();
    const bool writable = alias_info && alias_info->isWrite();
    auto lower = [&](const Tensor& tensor) -> Tensor {
      if (!on_device(tensor)) {
        check_devices(op, tensor);
        return tensor;
      }
      pairs.push_back({tensor, as_cpu(tensor), writable});
      return pairs.back().cpu;
    };
    if (value.isTensor()) {
      value = lower(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> lowered;
      for (const Tensor& tensor : value.toTensorVector()) lowered.push_back(lower(tensor));
      value = std::move(lowered);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> lowered;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        lowered.push_back(tensor ? std::optional<Tensor>(lower(*tensor)) : std::nullopt);
      }
      value = std::move(lowered);
    } else if (value.isDevice() && value.toDevice() == kDevice) {
      value = c10::Device(c10::kCPU);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ChargeDevice charge;
    follow_main_thread();
    op.redispatchBoxed(kCpuKey, stack);
  }
  for (const Pair& pair : pairs) {
    if (pair.writable) write_back(pair.device, pair.cpu);
  }
  c10::SmallVector<std::pair<c10::StorageImpl*, c10::Storage>, 4> new_storages;
  auto lift = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    for (const Pair& pair : pairs) {
      if (pair.cpu.is_same(tensor)) return pair.device;
    }
    for (const Pair& pair : pairs) {
      if (cpu_storage(pair.device) == storage) return tensor_over(pair.device.storage(), tensor, kDeviceKey);
    }
    for (const auto& known : new_storages) {
      if (known.first == storage) return tensor_over(known.second, tensor, kDeviceKey);
    }
    new_storages.emplace_back(storage, device_storage(tensor.storage()));
    return tensor_over(new_storages.back().second, tensor, kDeviceKey);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = lift(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> lifted;
      for (const Tensor& tensor : value.toTensorVector()) lifted.push_back(lift(tensor));
      value = std::move(lifted);
    }
  }
}

// ---- the ops that are not simply the CPU's ----

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_allocator, kDeviceKey, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_allocator, kDeviceKey, c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& to, const Tensor& from, bool /*non_blocking*/) {
  if (on_device(to) && !on_device(from)) host_to_device += to.nbytes();
  if (!on_device(to) && on_device(from)) device_to_host += to.nbytes();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  ChargeDevice charge(on_device(to) && on_device(from));
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  return const_cast<Tensor&>(to).copy_(from, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  return const_cast<Tensor&>(to).resize_(from.sizes()).copy_(from);
}

at::Scalar read_scalar(const Tensor& tensor) {
  scalars_read++;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return at::_local_scalar_dense(as_cpu(tensor));
}

Tensor& set_empty(Tensor& tensor) { return tensor.set_(at::empty({0}, tensor.options())); }

// Real zeros: the CPU's kernel answers with a tensor that has no memory and is marked by a key of its own.
Tensor zeros(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>) {
  return at::zeros(C10_AS_INTARRAYREF_SLOW(size), at::TensorOptions(kDevice).dtype(dtype));
}

// On accelerators torch's dropout goes to this kernel, which keeps a mask of 1 byte an element. Only the scale, rounded
// first to the dtype as the dropout for CPU tensors does, keeps the numbers equal to the CPU's.
double dropout_scale(double kept, const Tensor& like) {
  return at::ones({}, like.scalar_type()).div_(kept).item<double>();
}

std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, std::optional<bool> train) {
  auto mask = at::empty_like(input, at::kBool);
  if (!train.value_or(true)) return {input.clone(), mask.fill_(true)};
  mask.bernoulli_(1 - p);
  return {input.mul(mask).mul_(p < 1 ? dropout_scale(1 - p, input) : 0), mask};
}

Tensor dropout_backward(const Tensor& gradient, const Tensor& mask, double scale) {
  return gradient.mul(mask).mul_(scale ? dropout_scale(1 / scale, gradient) : 0);
}

void record_stream(Tensor&, c10::Stream) {}

// scaled_dot_product_attention asks the device which of its kernels to take; the answer is the CPU's.
int64_t attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                         double dropout, bool causal, std::optional<double> scale, bool grouped) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto lower = [](const Tensor& tensor) {
    const bool fake = tensor.key_set().has(c10::DispatchKey::Python);
    if (!fake) return as_cpu(tensor);
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
  };
  const auto mask_on_cpu = mask ? std::optional(lower(*mask)) : std::nullopt;
  return at::_fused_sdp_choice(lower(query), lower(key), lower(value), mask_on_cpu, dropout, causal, scale, grouped);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_scalar);
  m.impl("_efficientzerotensor", zeros);
  m.impl("native_dropout", dropout);
  m.impl("native_dropout_backward", dropout_backward);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_", set_empty);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  // These ask for the device type, and know the CPU's.
  for (const char* name : {"convolution", "convolution_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  // A fallback alone would leave to torch's composite definitions what the CPU has faster kernels for.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto op = c10::Dispatcher::singleton().findOp(name);
    if (name.getNamespace() == "aten" && op && op->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
      const auto overload = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      m.impl(overload.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// Autocast follows CUDA's lists.
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_BY_DEFAULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_BY_DEFAULT)
  AT_FORALL_PROMOTE(WIDEST)
}

// ---- streams and events: everything is done when the call returns, so they only keep the books ----

thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> streams_made{0};

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;
  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(++streams_made); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream, next.id()));
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  double elapsedTime(void* start, void* end, c10::DeviceIndex) const override {
    const auto elapsed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }
};

// Random numbers come from the CPU's generator, so that a seed means the same on both devices.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return pinned_memory.owns(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto resized = device_allocator.allocate(bytes);
    std::memcpy(resized.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(resized));
    storage.set_nbytes(bytes);
  }
};

// The engine counts devices at the first backward of the process and starts a thread for each; a device registered
// after that has to add its own. It is ended before Python is: afterwards it could not let go of Python objects.
struct Engine final : torch::autograd::Engine {
  static void start_device_thread() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    auto& queues = engine.*(&Engine::device_ready_queues_);
    TORCH_CHECK(queues.empty(), "the autograd engine has a device thread already");
    queues.push_back(std::make_shared<torch::autograd::ReadyQueue>());
    std::thread(&torch::autograd::Engine::thread_init, &engine, 0, queues.front(), true).detach();
  }
  static void stop_device_thread() { torch::autograd::Engine::get_default_engine().stop(); }
};

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)
}

namespace c10 {
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &device_allocator)
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::kCPU, &host_allocator, /*priority=*/255);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  follow_main_thread();
  m.def("start_autograd_thread", &Engine::start_device_thread);
  m.def("stop_autograd_thread", &Engine::stop_device_thread, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("memory_allocated", [] { return device_memory.current; });
  m.def("max_memory_allocated", [] { return device_memory.peak; });
  m.def("total_memory_allocated", [] { return device_memory.allocated; });
  m.def("reset_peak_memory_stats", [] { device_memory.peak = device_memory.current; });
  m.def("set_memory_cap", [](std::optional<size_t> bytes) { device_memory.cap = bytes.value_or(kNoCap); });
  m.def("pinned_memory_allocated", [] { return pinned_memory.current; });
  m.def("host_to_device_bytes", [] { return host_to_device.load(); });
  m.def("device_to_host_bytes", [] { return device_to_host.load(); });
  m.def("scalars_read", [] { return scalars_read.load(); });
  m.def("reset_copy_counters", [] { host_to_device = device_to_host = scalars_read = 0; });
}

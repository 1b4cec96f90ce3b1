// Memory, streams, events, generators and the hooks by which torch finds the simulated NPU.
#include "card.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <chrono>
#include <map>
#include <mutex>
#include <thread>

namespace simulated {

Card cards[MAX_CARDS];
int card_count = 0;
int64_t card_memory = int64_t(64) << 30;

namespace {

const std::thread::id main_thread = std::this_thread::get_id();
thread_local c10::DeviceIndex card_of_thread = -1;

thread_local c10::StreamId stream_of_thread[MAX_CARDS] = {};

// How far streams of cards have to have come: to the copies with numbers up to these.
using Streams = std::map<std::pair<c10::DeviceIndex, c10::StreamId>, int64_t>;

struct Copy {
  c10::DeviceIndex card;
  c10::StreamId stream;
  int64_t number;
  std::function<void()> make;
};

// Kept to the end of the process, as whatever tensors may be destroyed after.
auto& copies_lock = *new std::mutex;
auto& copies = *new std::vector<Copy>;
auto& waited_for = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Streams>;
int64_t copies_asked_for = 0;

void add(Streams& streams, const Streams& more) {
  for (const auto& [stream, number] : more) streams[stream] = std::max(streams[stream], number);
}

// With copies_lock held.
Streams reached_by(c10::DeviceIndex card, c10::StreamId stream) {
  Streams reached = waited_for[{card, stream}];
  reached[{card, stream}] = copies_asked_for;
  return reached;
}

// With copies_lock held: who comes while another thread makes them waits for that one. What is returned holds tensors of
// Python and is to be destroyed without the lock.
std::vector<Copy> finish(const Streams& streams) {
  std::vector<Copy> made, left;
  for (auto& copy : copies) {
    const auto reached = streams.find({copy.card, copy.stream});
    const bool wanted = reached != streams.end() && copy.number <= reached->second;
    if (wanted) copy.make();
    (wanted ? made : left).push_back(std::move(copy));
  }
  copies = std::move(left);
  return made;
}

void check_card(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < card_count, "simulated npu: invalid device ID ", int(index), ", this process sees ",
              card_count, " card(s) (ERR00100, error code 107001)");
}

}  // namespace

c10::DeviceIndex current_card_or_none() {
  if (card_of_thread < 0 && std::this_thread::get_id() == main_thread) card_of_thread = 0;
  return card_of_thread;
}

c10::DeviceIndex current_card() {
  const auto card = current_card_or_none();
  TORCH_CHECK(card >= 0, "simulated npu: this thread has no current device. A thread has to call torch.npu.set_device ",
              "before it works on a card (ERR00100 PTA call acl api failed: context pointer null)");
  check_card(card);
  return card;
}

void set_card(c10::DeviceIndex index) {
  check_card(index);
  card_of_thread = index;
}

c10::StreamId current_stream(c10::DeviceIndex card) { return stream_of_thread[card]; }

void defer(c10::DeviceIndex card, std::function<void()> copy) {
  std::lock_guard<std::mutex> guard(copies_lock);
  copies.push_back({card, current_stream(card), ++copies_asked_for, std::move(copy)});
}

void finish_copies(c10::DeviceIndex card, c10::StreamId stream) {
  std::vector<Copy> made;
  std::lock_guard<std::mutex> guard(copies_lock);
  made = finish(reached_by(card, stream));
}

void finish_copies(c10::DeviceIndex card) {
  std::vector<Copy> made;
  std::lock_guard<std::mutex> guard(copies_lock);
  Streams all;
  for (const auto& [stream, streams] : waited_for) {
    if (stream.first == card) add(all, streams);
  }
  for (const auto& copy : copies) {
    if (copy.card == card) all[{card, copy.stream}] = copies_asked_for;
  }
  made = finish(all);
}

namespace {

struct Block {
  void* data;
  int64_t bytes;
  c10::DeviceIndex card;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  cards[block->card].allocated -= block->bytes;
  std::free(block->data);
  delete block;
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const auto card = current_card();
    auto& memory = cards[card];
    const int64_t now = memory.allocated += int64_t(bytes);
    if (now > card_memory) {
      memory.allocated -= int64_t(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "NPU out of memory. NPU ", int(card), " Tried to allocate ", bytes,
                       " bytes (", card_memory, " total capacity; ", memory.allocated.load(), " allocated)");
    }
    int64_t peak = memory.peak;
    while (now > peak && !memory.peak.compare_exchange_weak(peak, now)) {
    }
    void* data = nullptr;
    if (bytes > 0 && posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    auto* block = new Block{data, int64_t(bytes), card};
    return {data, block, &release, c10::Device(c10::DeviceType::PrivateUse1, card)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

CardAllocator card_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &card_allocator);

// Page-locked host memory: ordinary memory that is written down.
auto& pinned_lock = *new std::mutex;  // kept to the end, as tensors may be destroyed after
auto& pinned = *new std::map<const char*, size_t>;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  const auto* byte = static_cast<const char*>(data);
  auto after = pinned.upper_bound(byte);
  return after != pinned.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

void release_pinned(void* data) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<char*>(data));
  }
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    current_card();  // this thread has one, in whose context aclrtMallocHost works
    void* data = nullptr;
    if (bytes > 0) {
      if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned[static_cast<char*>(data)] = bytes;
    }
    return {data, data, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

PinnedAllocator pinned_allocator;

// Numbers of the host's generator under the card's name.
struct CardGenerator final : c10::GeneratorImpl {
  explicit CardGenerator(c10::DeviceIndex card, at::Generator host = at::make_generator<at::CPUGeneratorImpl>())
      : c10::GeneratorImpl(c10::Device(c10::DeviceType::PrivateUse1, card),
                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "simulated npu: no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "simulated npu: no offset"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  CardGenerator* clone_impl() const override { return new CardGenerator(device().index(), host.clone()); }

  at::Generator host;
};

const at::Generator& default_generator(c10::DeviceIndex card) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (int index = 0; index < MAX_CARDS; ++index) made.push_back(at::make_generator<CardGenerator>(index));
    return made;
  }();
  return generators.at(card < 0 ? current_card() : card);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return card_count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return card_count > 0; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return card_count; }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_card(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current_card(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto before = current_card_or_none();
    set_card(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<CardGenerator>(index < 0 ? current_card() : index);
  }
  at::Device getDeviceFromPtr(void*) const override { return {c10::DeviceType::PrivateUse1, current_card()}; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr larger = card_allocator.allocate(bytes);
    std::memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// But for copies to page-locked memory everything is done when it is asked for.
struct Event {
  std::chrono::steady_clock::time_point time;
  Streams reached;
};

std::atomic<c10::StreamId> streams_made{0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto static_type = c10::DeviceType::PrivateUse1;
  c10::DeviceType type() const override { return static_type; }
  c10::Device named(c10::DeviceIndex index) const { return {static_type, index}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current_card_or_none();
    uncheckedSetDevice(device);
    return named(before);
  }
  c10::Device getDevice() const override { return named(current_card()); }
  void setDevice(c10::Device device) const override { set_card(device.index()); }
  // Back to "none" where a guard ends in a thread that had none.
  void uncheckedSetDevice(c10::Device device) const noexcept override { card_of_thread = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return card_count; }

  c10::Stream stream(c10::Device device, c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, device.has_index() ? device : getDevice(), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(device, current_stream(device.has_index() ? device.index() : current_card()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, ++streams_made); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = getStream(next.device());
    stream_of_thread[next.device_index()] = next.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override { return synchronizeStream(stream), true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    current_card();  // this thread has one
    finish_copies(stream.device_index(), stream.id());
  }
  void synchronizeDevice(const c10::DeviceIndex card) const override {
    const auto own = current_card();
    finish_copies(card < 0 ? own : card);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    std::lock_guard<std::mutex> guard(copies_lock);
    *static_cast<Event*>(*event) = {std::chrono::steady_clock::now(), reached_by(stream.device_index(), stream.id())};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;  // never recorded
    std::lock_guard<std::mutex> guard(copies_lock);
    add(waited_for[{stream.device_index(), stream.id()}], static_cast<Event*>(event)->reached);
  }
  bool queryEvent(void* event) const override { return synchronizeEvent(event), true; }
  void synchronizeEvent(void* event) const override {
    current_card();  // this thread has one
    if (event == nullptr) return;
    std::vector<Copy> made;
    std::lock_guard<std::mutex> guard(copies_lock);
    made = finish(static_cast<Event*>(event)->reached);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto passed = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

at::Generator host_generator(const std::optional<at::Generator>& given, c10::DeviceIndex card) {
  if (given.has_value() && given->defined()) {
    TORCH_CHECK(given->device().type() == c10::DeviceType::PrivateUse1,
                "Expected a 'npu' device type for generator but found '", given->device().type(), "'");
    return static_cast<CardGenerator*>(given->unsafeGetGeneratorImpl())->host;
  }
  return static_cast<CardGenerator*>(default_generator(card).unsafeGetGeneratorImpl())->host;
}

void start(int count, int64_t memory) {
  TORCH_CHECK(count >= 0 && count <= MAX_CARDS, "simulated npu: ", count, " cards");
  card_count = count;
  card_memory = memory;
  at::RegisterPrivateUse1HooksInterface(new Hooks());  // torch keeps it to the end
}

void bind_hccl(pybind11::module_&);

}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace simulated;
  module.def("start", &start);
  module.def("current_card", &current_card);
  module.def("set_card", &set_card);
  module.def("finish_copies", [](int card) {
    const pybind11::gil_scoped_release waiting;
    finish_copies(c10::DeviceIndex(card));
  });
  module.def("counters", [](int card) {
    return std::map<std::string, int64_t>{{"kernels", cards[card].kernels},
                                          {"allocated", cards[card].allocated},
                                          {"peak", cards[card].peak}};
  });
  module.def("reset_peak", [](int card) { cards[card].peak = cards[card].allocated.load(); });
  module.def("default_generator", [](int card) { return default_generator(card); });
  bind_hccl(module);
}

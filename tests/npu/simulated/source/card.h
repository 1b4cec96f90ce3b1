// The cards of the simulated NPU: how many there are, which one a thread works on, what memory they hold.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <cstdint>
#include <functional>

namespace simulated {

constexpr int MAX_CARDS = 64;

struct Card {
  std::atomic<int64_t> kernels{0};     // operators that ran on it
  std::atomic<int64_t> allocated{0};   // bytes
  std::atomic<int64_t> peak{0};        // bytes
};

extern Card cards[MAX_CARDS];
extern int card_count;
extern int64_t card_memory;  // bytes of each card

// The card of this thread. The main thread begins with card 0; any other has none until it sets one, as with some
// releases of torch_npu.
c10::DeviceIndex current_card();
c10::DeviceIndex current_card_or_none();
void set_card(c10::DeviceIndex index);

// The stream that this thread gives a card its work on.
c10::StreamId current_stream(c10::DeviceIndex card);

// Copies to page-locked memory that were asked for, on this thread's stream of the card, and not waited for yet. The
// host's memory holds something else (0xFF in every byte, which is NaN) until then.
void defer(c10::DeviceIndex card, std::function<void()> copy);
// Those of a stream, with what it was told to wait for, and of all streams of a card.
void finish_copies(c10::DeviceIndex card, c10::StreamId stream);
void finish_copies(c10::DeviceIndex card);

}  // namespace simulated

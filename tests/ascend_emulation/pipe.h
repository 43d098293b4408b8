// Buffers, queues and events. SIMD-API/基础API/资源管理/{TPipe,TQue,TQueBind,TBuf},
// 同步控制/核内同步
#pragma once

#include <deque>
#include <exception>
#include <memory>

#include "tensor.h"

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

using TEventID = int8_t;

// 同步控制/核内同步/核内同步能力概述.md, 表3
enum class HardEvent : uint8_t {
  S_V,
  S_MTE2,
  S_MTE3,
  V_S,
  V_MTE2,
  V_MTE3,
  MTE2_S,
  MTE2_V,
  MTE2_MTE3,
  MTE3_S,
  MTE3_V,
  MTE3_MTE2,
  MAX
};

namespace detail {

struct Ends {
  emulation::Pipe from, to;
};
constexpr Ends kEnds[] = {
    {emulation::kScalar, emulation::kVector}, {emulation::kScalar, emulation::kMte2},
    {emulation::kScalar, emulation::kMte3},   {emulation::kVector, emulation::kScalar},
    {emulation::kVector, emulation::kMte2},   {emulation::kVector, emulation::kMte3},
    {emulation::kMte2, emulation::kScalar},   {emulation::kMte2, emulation::kVector},
    {emulation::kMte2, emulation::kMte3},     {emulation::kMte3, emulation::kScalar},
    {emulation::kMte3, emulation::kVector},   {emulation::kMte3, emulation::kMte2},
};
constexpr Ends ends(HardEvent event) { return kEnds[static_cast<int>(event)]; }

// The event of a way through a queue. TQue/EnQue.md; TQueBind/TQueBind简介.md
constexpr HardEvent forward(TPosition source, TPosition target) {
  return source == TPosition::GM   ? HardEvent::MTE2_V
         : target == TPosition::GM ? HardEvent::V_MTE3
                                   : HardEvent::MTE2_MTE3;  // VECIN bound to VECOUT
}
constexpr HardEvent backward(TPosition source, TPosition target) {
  return source == TPosition::GM   ? HardEvent::V_MTE2
         : target == TPosition::GM ? HardEvent::MTE3_V
                                   : HardEvent::MTE3_MTE2;
}

}  // namespace detail

// 同步控制/核内同步/SetFlag-WaitFlag(ISASI).md
template <HardEvent event>
void SetFlag(int32_t id) {
  emulation::core.set_flag(detail::ends(event).from, detail::ends(event).to, id);
}
template <HardEvent event>
void WaitFlag(int32_t id) {
  emulation::core.wait_flag(detail::ends(event).from, detail::ends(event).to, id);
}

// 同步控制/核内同步/PipeBarrier(ISASI).md
template <pipe_t pipe>
void PipeBarrier() {
  static_assert(pipe != PIPE_S, "PipeBarrier has no PIPE_S");
  if (pipe == PIPE_ALL)
    emulation::core.barrier_all();
  else
    emulation::core.barrier(static_cast<emulation::Pipe>(pipe));
}

// 资源管理/TQueBind
template <TPosition source, TPosition target, int32_t depth>
class TQueBind {
 public:
  static_assert(depth == 1 || depth == 2, "only these depths are emulated");
  static constexpr HardEvent kForward = detail::forward(source, target),
                             kBackward = detail::backward(source, target);
  static constexpr bool kIsTiles = kForward == HardEvent::MTE2_MTE3;
  static constexpr TPosition kPosition = target == TPosition::GM ? source : target;

  template <class T>
  LocalTensor<T> AllocTensor() {
    for (size_t tried = 0; tried < entries_.size(); ++tried) {
      // In turn: that is what makes two buffers overlap.
      Entry& entry = entries_[next_++ % entries_.size()];
      if (entry.buffer->state != Buffer::kFree) continue;
      if (entry.freed >= 0) take<kBackward>(entry.freed);
      entry.buffer->state = Buffer::kAllocated;
      if (kIsTiles) emulation::core.begin_tile();
      emulation::core.forget(entry.buffer->address, entry.buffer->bytes);
      return {entry.buffer.get(), entry.buffer->address};
    }
    emulation::refuse("queue: AllocTensor, but none of the %d buffers was freed",
                      (int)entries_.size());
  }

  template <class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    return enqueue<kForward>(tensor.buffer());
  }
  template <TPosition from, TPosition to, class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    return enqueue<detail::forward(from, to)>(tensor.buffer());
  }
  template <class T>
  LocalTensor<T> DeQue() {
    return dequeue<kForward, T>();
  }
  template <TPosition from, TPosition to, class T>
  LocalTensor<T> DeQue() {
    return dequeue<detail::forward(from, to), T>();
  }

  template <class T>
  void FreeTensor(LocalTensor<T>& tensor) {
    Entry& entry = find(tensor.buffer());
    emulation::require(
        entry.buffer->state == Buffer::kDequeued || entry.buffer->state == Buffer::kAllocated,
        "queue: FreeTensor of a tensor that %s", Buffer::kNames[entry.buffer->state]);
    entry.buffer->state = Buffer::kFree;
    if (kIsTiles) emulation::core.end_tile();
    entry.freed = give<kBackward>();
  }

  // At the end of the kernel, the framework waits for the events of the buffers that were freed.
  ~TQueBind() noexcept(false) {  // NOLINT(bugprone-unsafe-to-allow-exceptions): a test reads them
    if (std::uncaught_exceptions()) return;
    for (const Entry& entry : entries_) {
      emulation::require(entry.buffer->state == Buffer::kFree,
                         "queue: a tensor is not freed at the end of the kernel");
      if (entry.freed >= 0)
        emulation::core.wait_flag(detail::ends(kBackward).from, detail::ends(kBackward).to,
                                  entry.freed);
    }
  }

 private:
  friend class TPipe;
  struct Entry {
    std::unique_ptr<Buffer> buffer;
    int freed = -1;  // the event of FreeTensor
  };
  struct Queued {
    Buffer* buffer;
    HardEvent event;
    int id;
  };

  template <HardEvent event>
  int give();
  template <HardEvent event>
  void take(int id);

  template <HardEvent event>
  bool enqueue(Buffer* buffer) {
    find(buffer);
    emulation::require(buffer->state == Buffer::kAllocated || buffer->state == Buffer::kDequeued,
                       "queue: EnQue of a tensor that %s", Buffer::kNames[buffer->state]);
    emulation::require((int)queue_.size() < depth, "queue: EnQue into a full queue of depth %d",
                       depth);
    buffer->state = Buffer::kEnqueued;
    queue_.push_back({buffer, event, give<event>()});
    return true;
  }

  template <HardEvent event, class T>
  LocalTensor<T> dequeue() {
    emulation::require(!queue_.empty(), "queue: DeQue from an empty queue");
    const Queued queued = queue_.front();
    queue_.pop_front();
    emulation::require(queued.event == event, "queue: DeQue with other positions than the EnQue");
    take<event>(queued.id);
    queued.buffer->state = Buffer::kDequeued;
    return {queued.buffer, queued.buffer->address};
  }

  Entry& find(Buffer* buffer) {
    for (Entry& entry : entries_)
      if (entry.buffer.get() == buffer) return entry;
    emulation::refuse("queue: the tensor is of another queue");
  }

  std::vector<Entry> entries_;
  size_t next_ = 0;
  std::deque<Queued> queue_;
};

// 资源管理/TQue/TQue简介.md
template <TPosition position, int32_t depth>
using TQue = std::conditional_t<position == TPosition::VECOUT,
                                TQueBind<TPosition::VECOUT, TPosition::GM, depth>,
                                TQueBind<TPosition::GM, TPosition::VECIN, depth>>;

// 资源管理/TBuf
template <TPosition position = TPosition::LCM>
class TBuf {
 public:
  template <class T>
  LocalTensor<T> Get() {
    return {&buffer_, buffer_.address};
  }

 private:
  friend class TPipe;
  Buffer buffer_ = {};
};

// 资源管理/TPipe
class TPipe {
 public:
  TPipe() {
    emulation::require(current() == nullptr, "pipe: a second TPipe");
    current() = this;
  }
  ~TPipe() { current() = nullptr; }
  TPipe(const TPipe&) = delete;

  template <TPosition source, TPosition target, int32_t depth>
  bool InitBuffer(TQueBind<source, target, depth>& queue, uint8_t number, uint32_t bytes) {
    // The buffers of one position hold the event ids of their way: TQue简介.md, TQue Buffer限制
    int& events = queue_buffers_[static_cast<int>(queue.kPosition)];
    events += number;
    emulation::require(events <= 8, "queue: %d buffers at one position; there are 8 events",
                       events);
    for (int i = 0; i < number; ++i) {
      const uint32_t address = take(bytes);
      queue.entries_.push_back({std::make_unique<Buffer>(
          Buffer{address, round_up(bytes), queue.kPosition, Buffer::kFree})});
    }
    return true;
  }

  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    buffer.buffer_ = {take(bytes), round_up(bytes), position, Buffer::kAlways};
    return true;
  }

  // 资源管理/TPipe/{AllocEventID,ReleaseEventID,FetchEventID}.md
  template <HardEvent event>
  TEventID AllocEventID() {
    uint8_t& used = events_[static_cast<int>(event)];
    for (int id = 0; id < 8; ++id)
      if (!(used >> id & 1)) {
        used |= 1 << id;
        return static_cast<TEventID>(id);
      }
    emulation::refuse("event: all 8 ids of %s_%s are taken",
                      emulation::kPipeNames[detail::ends(event).from],
                      emulation::kPipeNames[detail::ends(event).to]);
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id) {
    events_[static_cast<int>(event)] &= ~(1 << id);
  }
  template <HardEvent event>
  TEventID FetchEventID() {
    const TEventID id = AllocEventID<event>();
    ReleaseEventID<event>(id);
    return id;
  }

  static TPipe*& current() {
    static TPipe* pipe = nullptr;
    return pipe;
  }

 private:
  static uint32_t round_up(uint32_t bytes) {
    return (bytes + emulation::kBlock - 1) / emulation::kBlock * emulation::kBlock;
  }

  uint32_t take(uint32_t bytes) {
    const uint32_t address = used_;
    used_ += round_up(bytes);
    emulation::require(used_ <= emulation::core.product->usable,
                       "budget: %u bytes of unified buffer; %s has %u", used_,
                       emulation::core.product->name, emulation::core.product->usable);
    emulation::require(++buffers_ <= 64, "budget: more than 64 buffers");
    return address;
  }

  uint32_t used_ = 0;
  int buffers_ = 0;
  std::map<int, int> queue_buffers_;
  std::array<uint8_t, static_cast<int>(HardEvent::MAX)> events_ = {};
};

inline TPipe* GetTPipePtr() { return TPipe::current(); }  // 资源管理/GetTPipePtr.md

template <TPosition source, TPosition target, int32_t depth>
template <HardEvent event>
int TQueBind<source, target, depth>::give() {
  const TEventID id = GetTPipePtr()->AllocEventID<event>();
  SetFlag<event>(id);
  return id;
}

template <TPosition source, TPosition target, int32_t depth>
template <HardEvent event>
void TQueBind<source, target, depth>::take(int id) {
  WaitFlag<event>(id);
  GetTPipePtr()->ReleaseEventID<event>(id);
}

}  // namespace AscendC

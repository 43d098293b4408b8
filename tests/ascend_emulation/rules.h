// Kernels that break one rule each (and some that keep it), by the name that test_rules.py calls
// them by.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "kernel_operator.h"

namespace rules {

using namespace AscendC;
using Kernel = std::function<void(uint8_t* input, uint8_t* output)>;

// What most kernels start from: 64 floats in and 64 floats out by queues, and a buffer to compute
// in.
struct Frame {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<> buffer;
  GlobalTensor<float> input, output;
  LocalTensor<float> x, work;

  Frame(uint8_t* from, uint8_t* to) {
    pipe.InitBuffer(in, 2, 256);
    pipe.InitBuffer(out, 2, 256);
    pipe.InitBuffer(buffer, 4096);
    input.SetGlobalBuffer((__gm__ float*)reinterpret_cast<uintptr_t>(from), 16384);
    output.SetGlobalBuffer((__gm__ float*)reinterpret_cast<uintptr_t>(to), 16384);
    work = buffer.Get<float>();
  }

  LocalTensor<float> load() {
    x = in.AllocTensor<float>();
    DataCopy(x, input, 64);
    in.EnQue(x);
    return x = in.DeQue<float>();
  }

  // Turns 16 blocks of `work` into the 16 behind them, by their addresses, and uses the result.
  void transpose(bool before, bool behind) {
    uint64_t targets[16], sources[16];
    for (int i = 0; i < 16; ++i) {
      sources[i] = (uint64_t)work[8 * i].GetPhyAddr();
      targets[i] = (uint64_t)work[8 * (16 + i)].GetPhyAddr();
    }
    Duplicate(work, 0.0f, 128);
    if (before) PipeBarrier<PIPE_V>();
    TransDataTo5HD<float>(targets, sources, TransDataTo5HDParams(false, false, 1, 0, 0));
    if (behind) PipeBarrier<PIPE_V>();
    Adds(work, work[128], 1.0f, 128);
  }

  // Reads a 0 by the scalar unit, has MTE3 put a 1 in its place, and reads it again.
  float reread(bool invalidates) {
    GlobalTensor<float> value = output[16384 - 64];
    DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(value);
    value.SetValue(0, 0.0f);
    value.GetValue(0);
    Duplicate(work, 0.0f, 64);
    SetFlag<HardEvent::S_MTE3>(0);
    WaitFlag<HardEvent::S_MTE3>(0);
    store(work, 16384 - 64);
    SetFlag<HardEvent::MTE3_S>(0);
    WaitFlag<HardEvent::MTE3_S>(0);
    if (invalidates)
      DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(value);
    return value.GetValue(0);
  }

  void store(const LocalTensor<float>& y, int64_t at) {
    LocalTensor<float> z = out.AllocTensor<float>();
    Adds(z, y, 1.0f, 64);
    out.EnQue(z);
    z = out.DeQue<float>();
    DataCopy(output[at], z, 64);
    out.FreeTensor(z);
  }
};

template <class F>
Kernel framed(F body) {
  return [body](uint8_t* input, uint8_t* output) {
    Frame frame(input, output);
    body(frame);
  };
}

inline const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"keeps every rule", framed([](Frame& f) {
         for (int i = 0; i < 5; ++i) {
           f.store(f.load(), GetBlockIdx() * 1024 + i * 64);
           f.in.FreeTensor(f.x);
         }
       })},
      {"alignment of an operand", framed([](Frame& f) { Duplicate(f.work[1], 0.0f, 8); })},
      {"alignment of a transfer's length", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopy(x, f.input, 7);
       })},
      {"alignment of a transfer's address", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopy(x[4], f.input, 8);
       })},
      {"budget of the unified buffer", framed([](Frame& f) {
         TBuf<> large;
         f.pipe.InitBuffer(large, 192 * 1024 - 256 - 8 * 1024 - 4096 - 4 * 256 + 32);
       })},
      {"budget of the unified buffer, the last byte", framed([](Frame& f) {
         TBuf<> large;
         f.pipe.InitBuffer(large, 192 * 1024 - 256 - 8 * 1024 - 4096 - 4 * 256);
       })},
      {"uninitialised read", framed([](Frame& f) { Abs(f.work, f.work[64], 64); })},
      {"uninitialised read of a buffer that was used before", framed([](Frame& f) {
         for (int i = 0; i < 3; ++i) {
           LocalTensor<float> y = f.out.AllocTensor<float>();
           if (i < 2) Duplicate(y, 0.0f, 64);
           f.out.EnQue(y);
           y = f.out.DeQue<float>();
           DataCopy(f.output[i * 64], y, 64);
           f.out.FreeTensor(y);
         }
       })},
      {"uninitialised tail of a padded transfer", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopyPad(x, f.input, DataCopyExtParams(1, 12, 0, 0, 0), DataCopyPadExtParams<float>());
         f.in.EnQue(x);
         x = f.in.DeQue<float>();
         Abs(f.work, x, 8);
       })},
      {"queue: use between EnQue and DeQue", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopy(x, f.input, 64);
         f.in.EnQue(x);
         Abs(f.work, x, 64);
       })},
      {"queue: use after FreeTensor", framed([](Frame& f) {
         f.load();
         f.in.FreeTensor(f.x);
         Abs(f.work, f.x, 64);
       })},
      {"queue: not freed", framed([](Frame& f) { f.load(); })},
      {"queue: no buffer left", framed([](Frame& f) {
         for (int i = 0; i < 3; ++i) f.load();
       })},
      {"queue: full", framed([](Frame& f) {
         LocalTensor<float> a = f.in.AllocTensor<float>(), b = f.in.AllocTensor<float>();
         f.in.EnQue(a);
         f.in.EnQue(b);
       })},
      {"queue: DeQue from an empty queue", framed([](Frame& f) { f.in.DeQue<float>(); })},
      {"queue: more buffers than events", framed([](Frame& f) {
         TQue<TPosition::VECIN, 1> more;
         f.pipe.InitBuffer(more, 7, 32);
       })},
      {"repeat of 256",
       framed([](Frame& f) { Add(f.work, f.work, f.work, 64, 256, {1, 1, 1, 0, 0, 0}); })},
      {"repeat of 0",
       framed([](Frame& f) { Add(f.work, f.work, f.work, 64, 0, {1, 1, 1, 8, 8, 8}); })},
      {"mask of 65",
       framed([](Frame& f) { Add(f.work, f.work, f.work, 65, 1, {1, 1, 1, 8, 8, 8}); })},
      {"blocks of a transfer", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopyPad(x, f.input, DataCopyExtParams(4096, 32, 0, 0, 0),
                     DataCopyPadExtParams<float>());
       })},
      {"overlap of a repeat with the next", framed([](Frame& f) {
         Duplicate(f.work, 0.0f, 192);
         Adds(f.work, f.work, 0.0f, 64);
         Add(f.work[64], f.work, f.work, 64, 2, {1, 1, 1, 8, 8, 8});
       })},
      {"overlap within a repeat", framed([](Frame& f) {
         Duplicate(f.work, 0.0f, 192);
         Add(f.work[8], f.work, f.work, 64, 1, {1, 1, 1, 8, 8, 8});
       })},
      {"bounds of a buffer", framed([](Frame& f) { Duplicate(f.work, 0.0f, 1025); })},
      {"bounds of global memory", framed([](Frame& f) {
         f.input = f.input[16384 - 63];
         f.load();
       })},
      {"a write to an input", framed([](Frame& f) {
         f.output = f.input;
         f.store(f.load(), 0);
       })},
      {"two cores write one address", framed([](Frame& f) {
         f.store(f.load(), 63 * GetBlockIdx());
         f.in.FreeTensor(f.x);
       })},
      {"a core reads what another writes", framed([](Frame& f) {
         f.input = f.output[64 * (1 - GetBlockIdx())];
         f.store(f.load(), 64 * GetBlockIdx());
         f.in.FreeTensor(f.x);
       })},
      {"scalar stores in one cache line",
       framed([](Frame& f) { f.output.SetValue(8 * GetBlockIdx(), 1.0f); })},
      {"scalar stores in two cache lines",
       framed([](Frame& f) { f.output.SetValue(16 * GetBlockIdx(), 1.0f); })},
      {"order: MTE2 to V without a queue", framed([](Frame& f) {
         TBuf<TPosition::VECIN> plain;
         f.pipe.InitBuffer(plain, 256);
         DataCopy(plain.Get<float>(), f.input, 64);
         Abs(f.work, plain.Get<float>(), 64);
       })},
      {"order: MTE2 to V by a flag", framed([](Frame& f) {
         TBuf<TPosition::VECIN> plain;
         f.pipe.InitBuffer(plain, 256);
         DataCopy(plain.Get<float>(), f.input, 64);
         SetFlag<HardEvent::MTE2_V>(0);
         WaitFlag<HardEvent::MTE2_V>(0);
         Abs(f.work, plain.Get<float>(), 64);
       })},
      {"order: V to MTE3 without a queue", framed([](Frame& f) {
         TBuf<TPosition::VECOUT> plain;
         f.pipe.InitBuffer(plain, 256);
         Duplicate(plain.Get<float>(), 0.0f, 64);
         DataCopy(f.output, plain.Get<float>(), 64);
       })},
      {"order: MTE2 refills what V still reads", framed([](Frame& f) {
         TBuf<TPosition::VECIN> plain;
         f.pipe.InitBuffer(plain, 256);
         for (int i = 0; i < 2; ++i) {
           DataCopy(plain.Get<float>(), f.input, 64);
           SetFlag<HardEvent::MTE2_V>(0);
           WaitFlag<HardEvent::MTE2_V>(0);
           Abs(f.work, plain.Get<float>(), 64);
         }
       })},
      {"order: MTE2 refills what MTE3 still reads", framed([](Frame& f) {
         TBuf<TPosition::VECIN> plain;
         f.pipe.InitBuffer(plain, 256);
         for (int i = 0; i < 2; ++i) {
           DataCopyPad(plain.Get<float>(), f.input, DataCopyExtParams(1, 256, 0, 0, 0),
                       DataCopyPadExtParams<float>());
           SetFlag<HardEvent::MTE2_MTE3>(0);
           WaitFlag<HardEvent::MTE2_MTE3>(0);
           DataCopyPad(f.output[i * 64], plain.Get<float>(), DataCopyExtParams(1, 256, 0, 0, 0));
         }
       })},
      {"order: S reads what MTE2 loads", framed([](Frame& f) {
         TBuf<TPosition::VECIN> plain;
         f.pipe.InitBuffer(plain, 256);
         DataCopy(plain.Get<float>(), f.input, 64);
         plain.Get<float>().GetValue(3);
       })},
      {"order: two loads into one place", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopy(x, f.input, 64);
         DataCopy(x, f.input[64], 64);
       })},
      {"order: two loads into one place with a barrier", framed([](Frame& f) {
         LocalTensor<float> x = f.in.AllocTensor<float>();
         DataCopy(x, f.input, 64);
         PipeBarrier<PIPE_MTE2>();
         DataCopy(x, f.input[64], 64);
         f.in.FreeTensor(x);
       })},
      {"order: two stores to one address", framed([](Frame& f) {
         for (int i = 0; i < 2; ++i) {
           f.store(f.load(), GetBlockIdx() * 1024);
           f.in.FreeTensor(f.x);
         }
       })},
      {"order: addresses without a barrier before",
       framed([](Frame& f) { f.transpose(false, true); })},
      {"order: addresses without a barrier behind",
       framed([](Frame& f) { f.transpose(true, false); })},
      {"order: addresses between barriers", framed([](Frame& f) { f.transpose(true, true); })},
      {"a value that changes after it was read, without an invalidation", framed([](Frame& f) {
         emulation::require(f.reread(false) == 0.0f, "cache: GetValue read what it should not see");
       })},
      {"a value that changes after it was read, with an invalidation", framed([](Frame& f) {
         emulation::require(f.reread(true) == 1.0f, "cache: GetValue read what was there before");
       })},
      {"event: set twice", framed([](Frame&) {
         SetFlag<HardEvent::V_S>(1);
         SetFlag<HardEvent::V_S>(1);
       })},
      {"event: wait without a set", framed([](Frame&) { WaitFlag<HardEvent::V_S>(1); })},
      {"event: set and never waited for", framed([](Frame&) { SetFlag<HardEvent::V_S>(1); })},
      {"position of a transfer", framed([](Frame& f) {
         DataCopyPad(f.work, f.input, DataCopyExtParams(1, 256, 0, 0, 0),
                     DataCopyPadExtParams<float>());
       })},
      {"fp8 on A2", framed([](Frame& f) {
         Duplicate(f.work, 0.0f, 64);
         Cast(f.work[64].ReinterpretCast<fp8_e4m3fn_t>(), f.work, RoundMode::CAST_RINT, 64);
       })},
  };
  return all;
}

}  // namespace rules

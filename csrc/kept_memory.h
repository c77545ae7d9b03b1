// Memory of large results on the CPU, kept for the next call.
//
// The system hands out a fresh block of megabytes page by page, each zeroed in a fault of its own, which takes longer
// than dropout's arithmetic; and malloc gives such blocks back as soon as they are freed. A training loop asks for the
// same sizes again and again, so the last freed blocks are kept, up to kKeptBytes in all.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <list>
#include <memory>
#include <mutex>

namespace pyconv {

class KeptMemory final : public c10::Allocator {
 public:
  static constexpr size_t kKeptBytes = size_t(128) << 20;
  static constexpr size_t kWorthKeeping = size_t(1) << 20;

  // Never destroyed: tensors may outlive every static object.
  static KeptMemory& instance() {
    static auto* memory = new KeptMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(bytes);
    if (!block) block = std::make_unique<Block>(Block{c10::GetCPUAllocator()->allocate(bytes), bytes});
    void* data = block->memory.get();
    return {data, block.release(), &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    c10::DataPtr memory;
    size_t bytes;
  };

  static void release(void* block) { instance().keep(std::unique_ptr<Block>(static_cast<Block*>(block))); }

  // Neither waits for another thread, which after a fork() might not exist: then the block comes from malloc or goes
  // back to it.
  std::unique_ptr<Block> take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto i = kept_.begin(); i != kept_.end(); ++i) {
      if ((*i)->bytes != bytes) continue;
      std::unique_ptr<Block> block = std::move(*i);
      kept_.erase(i);
      kept_bytes_ -= bytes;
      return block;
    }
    return nullptr;
  }

  void keep(std::unique_ptr<Block> block) {
    std::list<std::unique_ptr<Block>> dropped;  // freed after the lock
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block->bytes > kKeptBytes) return;
    kept_bytes_ += block->bytes;
    kept_.push_front(std::move(block));
    while (kept_bytes_ > kKeptBytes) {
      kept_bytes_ -= kept_.back()->bytes;
      dropped.splice(dropped.end(), kept_, std::prev(kept_.end()));
    }
  }

  std::mutex mutex_;
  std::list<std::unique_ptr<Block>> kept_;  // the last freed first
  size_t kept_bytes_ = 0;
};

// at::empty_like for a kernel's result.
inline at::Tensor empty_result_like(const at::Tensor& t) {
  if (!t.device().is_cpu() || t.nbytes() < KeptMemory::kWorthKeeping || !t.is_non_overlapping_and_dense()) {
    return at::empty_like(t);
  }
  return at::detail::empty_strided_generic(t.sizes(), t.strides(), &KeptMemory::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), t.scalar_type());
}

}  // namespace pyconv

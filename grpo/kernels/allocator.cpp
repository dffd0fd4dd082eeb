// Memory of torch's CPU tensors: the best fit among freed blocks, which are joined with their neighbours again. Before
// more is taken from the system, all free memory goes back to it, so the process holds little more than it uses.
//
// glibc aligns a block by cutting it out of a larger one and, before 2.38, does not use the gap again for an aligned
// block of the same size. The blocks that a model's layers allocate and free in turn leave holes of a third of the
// memory in use. Blocks under SMALL, and blocks that the system has no pages for, go to torch's own allocator, with its
// own error.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceType.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t PAGE = 4096, SMALL = 64 << 10, SEGMENT = 16 << 20;

struct Arena {
  std::mutex mutex;
  std::map<char*, size_t> free_by_address;
  std::set<std::pair<size_t, char*>> free_by_size;
  std::unordered_map<void*, size_t> used;
  size_t bytes_used = 0, most = 0;

  void add_free(char* block, size_t size) {
    auto next = free_by_address.lower_bound(block);
    if (next != free_by_address.end() && block + size == next->first) {
      size += next->second;
      next = remove_free(next);
    }
    if (next != free_by_address.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == block) {
        block = previous->first;
        size += previous->second;
        remove_free(previous);
      }
    }
    free_by_address[block] = size;
    free_by_size.insert({size, block});
  }

  std::map<char*, size_t>::iterator remove_free(std::map<char*, size_t>::iterator found) {
    free_by_size.erase({found->second, found->first});
    return free_by_address.erase(found);
  }

  void trim() {
    for (auto block = free_by_address.begin(); block != free_by_address.end();)
      block = munmap(block->first, block->second) == 0 ? remove_free(block) : std::next(block);
  }

  bool grow(size_t size) {
    if (bytes_used + size > most) {
      most = bytes_used + size;
      malloc_trim(0);  // returns what loading left among smaller blocks; takes milliseconds, and only at new peaks
    }
    trim();
    void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return false;
    madvise(pages, size, MADV_HUGEPAGE);
    add_free(static_cast<char*>(pages), size);
    return true;
  }

  // nullptr where the system has no more.
  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto fit = free_by_size.lower_bound({size, nullptr});
    if (fit == free_by_size.end()) {
      if (!grow(std::max(size, SEGMENT)) && !grow(size)) return nullptr;
      fit = free_by_size.lower_bound({size, nullptr});
    }
    const auto [found, block] = *fit;
    remove_free(free_by_address.find(block));
    if (found > size) add_free(block + size, found - size);
    used[block] = size;
    bytes_used += size;
    return block;
  }

  // false where the block is someone else's.
  bool give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = used.find(block);
    if (found == used.end()) return false;
    add_free(static_cast<char*>(block), found->second);
    bytes_used -= found->second;
    used.erase(found);
    return true;
  }
};

Arena& arena = *new Arena;  // never destroyed: tensors may outlive what a process destroys at its end

// For every block, whichever allocator it is from: raw_deleter has to be a single function.
void release(void* block) {
  const bool at_page = reinterpret_cast<uintptr_t>(block) % PAGE == 0;
  if (at_page && arena.give_back(block))
    c10::profiledCPUMemoryReporter().Delete(block);
  else
    c10::GetDefaultCPUAllocator()->raw_deallocate(block);
}

struct Pages final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* block = size < SMALL ? nullptr : arena.take((size + PAGE - 1) / PAGE * PAGE);
    if (block != nullptr)
      c10::profiledCPUMemoryReporter().New(block, size);
    else
      block = c10::GetDefaultCPUAllocator()->raw_allocate(size);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" {

void install() {
  static Pages& pages = *new Pages;
  pthread_atfork([] { arena.mutex.lock(); }, [] { arena.mutex.unlock(); }, [] { arena.mutex.unlock(); });
  c10::SetCPUAllocator(&pages);
}

void trim() {
  const std::lock_guard<std::mutex> lock(arena.mutex);
  arena.trim();
}

// For tests alone, like bytes_free.
size_t bytes_used() {
  const std::lock_guard<std::mutex> lock(arena.mutex);
  return arena.bytes_used;
}

size_t bytes_free() {
  const std::lock_guard<std::mutex> lock(arena.mutex);
  size_t bytes = 0;
  for (const auto& block : arena.free_by_address) bytes += block.second;
  return bytes;
}
}

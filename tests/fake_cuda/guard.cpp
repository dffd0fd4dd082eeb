// What autograd asks of a device, for "cuda" in a build of torch that has none, so that it runs on fake tensors of that
// device. It guards nothing: fake tensors have no memory and no stream. It must not be loaded into a real CUDA build.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <cstring>

namespace {
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
}  // namespace

namespace impl = c10::impl;
constexpr auto CUDA = c10::DeviceType::CUDA;

static void* theirs = nullptr;

extern "C" void install() {
  static const impl::FakeGuardImpl<CUDA> guard;
  impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(&guard);
  // torch made its hooks when it was imported, and keeps them. They have no members: the table of functions is all.
  static const Hooks hooks;
  void* made = (void*)&at::detail::getCUDAHooks();
  std::memcpy(&theirs, made, sizeof(void*));
  std::memcpy(made, (const void*)&hooks, sizeof(void*));
}

extern "C" void remove_again() {
  impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(nullptr);
  std::memcpy((void*)&at::detail::getCUDAHooks(), &theirs, sizeof(void*));
}

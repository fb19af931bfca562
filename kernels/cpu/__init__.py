"""Native CPU kernels: one C++ file with a C ABI, loaded with ctypes."""

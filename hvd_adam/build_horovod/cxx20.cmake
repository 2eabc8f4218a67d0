# Toolchain file that compiles an unmodified Horovod 0.28.1 as C++20. Named by the environment variable
# CMAKE_TOOLCHAIN_FILE (CMake >= 3.21). CXXFLAGS cannot do this: CMake puts its own -std after them.
set(CMAKE_USER_MAKE_RULES_OVERRIDE_CXX "${CMAKE_CURRENT_LIST_DIR}/standard_override.cmake")
set(CMAKE_USER_MAKE_RULES_OVERRIDE_CUDA "${CMAKE_CURRENT_LIST_DIR}/standard_override.cmake")

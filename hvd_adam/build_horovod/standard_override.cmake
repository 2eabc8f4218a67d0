# Horovod requests C++14 (and C++11 in its CUDA kernels). PyTorch's headers need C++17 from 2.1 on and C++20 from
# 2.15 on. This file replaces the flag of each older standard by that of C++20.
foreach(language CXX CUDA)
  foreach(standard 11 14 17)
    if(DEFINED CMAKE_${language}${standard}_STANDARD_COMPILE_OPTION)
      set(CMAKE_${language}${standard}_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_${language}${standard}_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
  endforeach()
endforeach()

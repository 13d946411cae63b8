// Status codes returned by every compiled entry; the binding turns them into Python exceptions.
#pragma once

namespace ranvier {

enum class Status : int {
  ok = 0,
  bad_shape = 1,
  bad_dtype = 2,
  null_pointer = 3,
  out_of_memory = 4,
  bad_mask = 5,
  bad_codes = 6,
};

}  // namespace ranvier

// The Python module ranvier._C: addresses and integers in, status codes turned into exceptions out. No torch headers; the
// interpreter lock is released while a kernel runs. Shapes and dtypes are checked by ranvier.ops, which owns the tensors.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/cpu_features.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "flash_attention/flash_attention.h"
#include "hadamard/hadamard.h"
#include "kv_attention/kv_attention.h"
#include "machine/machine.h"
#include "spike_linear/spike_linear.h"
#include "spike_rms_norm/spike_rms_norm.h"
#include "spike_silu_mul/spike_silu_mul.h"
#include "ternary_linear/ternary_linear.h"
#include "weight_only_linear/weight_only_linear.h"

namespace py = pybind11;

namespace {

using ranvier::DType;
using ranvier::Status;
using Address = std::uintptr_t;

void raise_on(Status status, const char* entry) {
  switch (status) {
    case Status::ok: return;
    case Status::bad_shape: throw std::invalid_argument(std::string(entry) + ": the layer's description is not consistent");
    case Status::bad_dtype: throw std::invalid_argument(std::string(entry) + ": dtype not supported");
    case Status::null_pointer: throw std::invalid_argument(std::string(entry) + ": a tensor that this layer needs is missing");
    case Status::bad_mask:
      throw std::invalid_argument(std::string(entry) + ": salient_mask does not mark as many channels as salient_count says");
    case Status::bad_codes:
      throw std::invalid_argument(std::string(entry) + ": codes are larger than this format's; encode them by spike_encode");
    case Status::out_of_memory: throw std::bad_alloc();
  }
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The struct as Python packed it: int64 fields in declaration order.
template <class T>
T unpack(const py::bytes& packed) {
  T value;
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != static_cast<Py_ssize_t>(sizeof(T))) throw std::invalid_argument("packed description has the wrong size");
  std::memcpy(&value, data, sizeof(T));
  return value;
}

void bind_core(py::module_& m) {
  m.def("set_parallel", [](Address parallel_for, Address num_threads) {
    ranvier::set_parallel(reinterpret_cast<ranvier::ParallelFor>(parallel_for),
                          reinterpret_cast<ranvier::NumThreads>(num_threads));
  });
  m.def("num_threads", &ranvier::num_threads);
  m.def("isa", [] { return std::string(ranvier::isa_name(ranvier::active_isa())); });
  m.def("detected_isa", [] { return std::string(ranvier::isa_name(ranvier::detected_isa())); });
  m.def("set_isa", [](const std::string& name) {
    ranvier::Isa isa;
    if (!ranvier::parse_isa(name.c_str(), &isa)) throw std::invalid_argument("unknown instruction-set level: " + name);
    return std::string(ranvier::isa_name(ranvier::set_isa(isa)));
  });
  m.def("isa_levels", [] {
    py::list names;
    for (int i = 0; i < ranvier::kIsaCount; ++i) names.append(ranvier::isa_name(static_cast<ranvier::Isa>(i)));
    return names;
  });
  m.def("cpu_features", [] {
    const ranvier::CpuFeatures& f = ranvier::cpu_features();
    py::dict d;
    d["brand"] = f.brand, d["avx2"] = f.avx2, d["fma"] = f.fma, d["f16c"] = f.f16c, d["avx512"] = f.avx512_base;
    d["avx512vnni"] = f.avx512_vnni, d["avx512bf16"] = f.avx512_bf16, d["xcr0"] = f.xcr0;
    return d;
  });
  m.def("machine_dot", [](std::int64_t iterations) {
    py::gil_scoped_release release;
    return ranvier::machine_dot(iterations);
  });
  m.def("machine_read", [](Address data, std::int64_t bytes) {
    py::gil_scoped_release release;
    return ranvier::machine_read(at<void>(data), bytes);
  });
}

void bind_spike(py::module_& m) {
  using ranvier::SpikeFormat;
  using ranvier::SpikeLayer;
  m.def("spike_encode", [](const py::bytes& format, Address mask, Address x, std::int64_t stride, std::int64_t dtype,
                           std::int64_t M, Address codes, Address scale, Address sums, Address zero) {
    const auto f = unpack<SpikeFormat>(format);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_encode(f, at<std::uint8_t>(mask), at<void>(x), stride, static_cast<DType>(dtype), M,
                                     at<std::int8_t>(codes), at<float>(scale), at<std::int32_t>(sums), at<std::int32_t>(zero));
    }
    raise_on(status, "spike_encode");
  });
  m.def("spike_linear", [](const py::bytes& layer, Address codes, Address scale, Address sums, Address zero, std::int64_t M,
                           Address y, std::int64_t dtype) {
    const auto l = unpack<SpikeLayer>(layer);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_linear(l, at<std::int8_t>(codes), at<float>(scale), at<std::int32_t>(sums),
                                     at<std::int32_t>(zero), M, at<void>(y), static_cast<DType>(dtype));
    }
    raise_on(status, "spike_linear");
  });
  m.def("ternary_linear", [](const py::bytes& layer, Address codes, Address scale, std::int64_t M, Address y,
                             std::int64_t dtype) {
    const auto l = unpack<SpikeLayer>(layer);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::ternary_linear(l, at<std::int8_t>(codes), at<float>(scale), M, at<void>(y), static_cast<DType>(dtype));
    }
    raise_on(status, "ternary_linear");
  });
  m.def("spike_encoding_bytes", [](const py::bytes& layer, std::int64_t M) {
    return ranvier::spike_encoding_bytes(unpack<SpikeLayer>(layer).format, M);
  });
  m.def("spike_encode_panels",
        [](const py::bytes& layer, Address x, std::int64_t stride, std::int64_t dtype, std::int64_t M, Address encoding) {
          const auto l = unpack<SpikeLayer>(layer);
          Status status;
          {
            py::gil_scoped_release release;
            status = ranvier::spike_encode_panels(l.format, at<std::uint8_t>(static_cast<Address>(l.mask)), at<void>(x), stride,
                                                  static_cast<DType>(dtype), M, at<void>(encoding));
          }
          raise_on(status, "spike_encode");
        });
  m.def("spike_linear_panels", [](const py::bytes& layer, Address encoding, std::int64_t M, Address y, std::int64_t dtype) {
    const auto l = unpack<SpikeLayer>(layer);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_linear_panels(l, at<void>(encoding), M, at<void>(y), static_cast<DType>(dtype));
    }
    raise_on(status, "spike_linear");
  });
  m.def("spike_linear_dynamic", [](const py::bytes& layer, Address x, std::int64_t stride, std::int64_t dtype, std::int64_t M,
                                   Address y, std::int64_t y_dtype) {
    const auto l = unpack<SpikeLayer>(layer);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_linear_dynamic(l, at<void>(x), stride, static_cast<DType>(dtype), M, at<void>(y),
                                             static_cast<DType>(y_dtype));
    }
    raise_on(status, "spike_linear");
  });
}

void bind_weight_only(py::module_& m) {
  m.def("weight_only_linear", [](const py::bytes& layer, Address x, std::int64_t stride, std::int64_t dtype, std::int64_t M,
                                 std::int64_t digits, Address y, std::int64_t y_dtype) {
    const auto l = unpack<ranvier::SpikeLayer>(layer);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::weight_only_linear(l, at<void>(x), stride, static_cast<DType>(dtype), M, digits, at<void>(y),
                                           static_cast<DType>(y_dtype));
    }
    raise_on(status, "weight_only_linear");
  });
}

void bind_hadamard(py::module_& m) {
  m.def("hadamard", [](Address x, Address y, std::int64_t rows, std::int64_t order, std::int64_t core, Address matrix,
                       std::int64_t dtype) {
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::hadamard(at<void>(x), at<void>(y), rows, order, core, at<float>(matrix), static_cast<DType>(dtype));
    }
    raise_on(status, "hadamard");
  });
}

void bind_spike_neighbours(py::module_& m) {
  using ranvier::SpikeFormat;
  using ranvier::SpikeLayer;
  const auto norm_of = [](Address x, std::int64_t stride, std::int64_t dtype, Address weight, std::int64_t K, double eps,
                          std::int64_t weighting, Address y) {
    return ranvier::RmsNorm{at<void>(x),
                            stride,
                            static_cast<DType>(dtype),
                            at<void>(weight),
                            K,
                            static_cast<float>(eps),
                            static_cast<ranvier::Weighting>(weighting),
                            at<void>(y)};
  };
  m.def("rms_norm", [norm_of](Address x, std::int64_t stride, std::int64_t dtype, Address weight, std::int64_t K, double eps,
                              std::int64_t weighting, Address y, std::int64_t M) {
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::rms_norm(norm_of(x, stride, dtype, weight, K, eps, weighting, y), M);
    }
    raise_on(status, "rms_norm");
  });
  m.def("spike_rms_norm", [norm_of](Address x, std::int64_t stride, std::int64_t dtype, Address weight, std::int64_t K,
                                    double eps, std::int64_t weighting, Address y, const py::bytes& format, Address mask,
                                    std::int64_t M, Address codes, Address scale, Address sums, Address zero) {
    const auto f = unpack<SpikeFormat>(format);
    Status status;
    {
      py::gil_scoped_release release;
      status =
          ranvier::spike_rms_norm(norm_of(x, stride, dtype, weight, K, eps, weighting, y), f, at<std::uint8_t>(mask), M,
                                  at<std::int8_t>(codes), at<float>(scale), at<std::int32_t>(sums), at<std::int32_t>(zero));
    }
    raise_on(status, "spike_rms_norm");
  });
  m.def("spike_rms_norm_panels",
        [norm_of](Address x, std::int64_t stride, std::int64_t dtype, Address weight, std::int64_t K, double eps,
                  std::int64_t weighting, Address y, const py::bytes& layer, std::int64_t M, Address encoding) {
          const auto l = unpack<SpikeLayer>(layer);
          Status status;
          {
            py::gil_scoped_release release;
            status = ranvier::spike_rms_norm_panels(norm_of(x, stride, dtype, weight, K, eps, weighting, y), l.format,
                                                    at<std::uint8_t>(static_cast<Address>(l.mask)), M, at<void>(encoding));
          }
          raise_on(status, "spike_rms_norm");
        });
  m.def("spike_silu_mul", [](Address gate, Address up, std::int64_t dtype, std::int64_t K, Address y, const py::bytes& format,
                             Address mask, std::int64_t M, Address codes, Address scale, Address sums, Address zero) {
    const auto f = unpack<SpikeFormat>(format);
    const ranvier::SiluMul gated{at<void>(gate), at<void>(up), static_cast<DType>(dtype), K, at<void>(y)};
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_silu_mul(gated, f, at<std::uint8_t>(mask), M, at<std::int8_t>(codes), at<float>(scale),
                                       at<std::int32_t>(sums), at<std::int32_t>(zero));
    }
    raise_on(status, "spike_silu_mul");
  });
  m.def("spike_gated_mlp", [](const py::bytes& gate, const py::bytes& up, const py::bytes& down, Address x, Address encoding,
                              std::int64_t dtype, std::int64_t M, Address hidden, Address y) {
    const ranvier::SpikeMlp mlp{unpack<SpikeLayer>(gate),
                                unpack<SpikeLayer>(up),
                                unpack<SpikeLayer>(down),
                                at<void>(x),
                                at<void>(encoding),
                                at<void>(hidden),
                                at<void>(y),
                                static_cast<DType>(dtype)};
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::spike_gated_mlp(mlp, M);
    }
    raise_on(status, "spike_gated_mlp");
  });
}

// An attention whose call is packed in bytes, and its logits' scale.
template <class Call>
void bind_attention(py::module_& m, const char* name, Status (*run)(const Call&, float)) {
  m.def(name, [name, run](const py::bytes& call, double scale) {
    const auto c = unpack<Call>(call);
    Status status;
    {
      py::gil_scoped_release release;
      status = run(c, static_cast<float>(scale));
    }
    raise_on(status, name);
  });
}

void bind_attentions(py::module_& m) {
  m.def("kv_append", [](const py::bytes& call) {
    const auto c = unpack<ranvier::KvAppend>(call);
    Status status;
    {
      py::gil_scoped_release release;
      status = ranvier::kv_append(c);
    }
    raise_on(status, "kv_attention_encode");
  });
  bind_attention(m, "kv_attention", ranvier::kv_attention);
  bind_attention(m, "flash_attention", ranvier::flash_attention);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of ranvier; call them through ranvier.ops.";
  bind_core(m);
  bind_spike(m);
  bind_weight_only(m);
  bind_hadamard(m);
  bind_spike_neighbours(m);
  bind_attentions(m);
}

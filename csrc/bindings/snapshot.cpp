// What a module's packed weights depend on, compared with what it was in a few microseconds: packed
// weights are right only as long as nothing has changed.
#include "bindings/snapshot.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/content_hash.h"
#include "seqkernels/library.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

// The dictionary of an object's attributes.
py::object attributes_of(PyObject* object) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!found) throw py::error_already_set();
  return found;
}

// What a dictionary held, in its order. Values are compared by identity, which finds every
// assignment; they are kept, so that none can be replaced by another at the same address.
class Contents {
 public:
  // The value of `own` is not looked at.
  explicit Contents(PyObject* dict, PyObject* own = nullptr) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      const bool skipped = own && PyObject_RichCompareBool(key, own, Py_EQ) == 1;
      keys_.push_back(py::reinterpret_borrow<py::object>(key));
      values_.push_back(skipped ? py::object() : py::reinterpret_borrow<py::object>(value));
    }
  }

  bool are_in(PyObject* dict) const {
    if (static_cast<size_t>(PyDict_Size(dict)) != values_.size()) return false;
    PyObject *key = nullptr, *value = nullptr;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++i) {
      if (key != keys_[i].ptr()) return false;
      if (values_[i] && value != values_[i].ptr()) return false;
    }
    return true;
  }

  template <class Visit>
  void each(Visit visit) {
    for (py::object& key : keys_) visit(key);
    for (py::object& value : values_) visit(value);
  }

 private:
  std::vector<py::object> keys_, values_;
};

// A module: its type, its attributes, and what is in those attributes that are dictionaries of
// torch's.
class Module {
 public:
  Module(PyObject* module, PyObject* own)
      : type_(Py_TYPE(module)), attributes_(attributes_of(module).ptr(), own) {
    const py::object dict = attributes_of(module);
    for (const char* name :
         {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}) {
      PyObject* const inner = PyDict_GetItemString(dict.ptr(), name);
      if (inner && PyDict_Check(inner))
        inner_.push_back({py::reinterpret_borrow<py::object>(inner), Contents(inner)});
    }
  }

  bool is(PyObject* module) const {
    if (Py_TYPE(module) != type_) return false;
    const py::object dict = attributes_of(module);
    if (!attributes_.are_in(dict.ptr())) return false;
    for (const auto& [inner, contents] : inner_) {
      if (!contents.are_in(inner.ptr())) return false;
    }
    return true;
  }

  template <class Visit>
  void each(Visit visit) {
    attributes_.each(visit);
    for (auto& [inner, contents] : inner_) {
      visit(inner);
      contents.each(visit);
    }
  }

 private:
  PyTypeObject* type_;
  Contents attributes_;
  std::vector<std::pair<py::object, Contents>> inner_;
};

struct Attribute {
  py::object owner, name, value;
};

class Snapshot {
 public:
  // Of `owner` and the modules within it, of class attributes (owner, name, ...), of values in
  // dictionaries (dictionary, key), of dictionaries that are empty, and of tensors: of their
  // contents, where those are few and an edit may go uncounted, else of what an edit changes. The
  // owner is not kept alive, since it keeps the snapshot in its attribute `own`. `offset`: where in
  // Python's object of a tensor torch keeps the tensor. Throws std::invalid_argument where a tensor
  // is not there.
  Snapshot(const py::object& owner, const py::str& own, const py::list& modules,
           const py::list& attributes, const py::list& items, const py::list& empty,
           const py::list& tensors, bool by_contents, size_t offset)
      : offset_(offset),
        owner_address_(owner.ptr()),
        owner_(owner.ptr(), own.ptr()),
        by_contents_(by_contents) {
    for (const py::handle module : modules) {
      if (module.ptr() == owner.ptr()) continue;
      modules_.push_back(
          {py::reinterpret_borrow<py::object>(module), Module(module.ptr(), nullptr)});
    }
    for (const py::handle pair : attributes) {
      const py::object kind = pair[py::int_(0)], name = pair[py::int_(1)];
      attributes_.push_back({kind, name, py::getattr(kind, name)});
    }
    for (const py::handle pair : items) {
      const py::dict dict = pair[py::int_(0)];
      const py::object name = pair[py::int_(1)];
      items_.push_back({dict, name, dict[name]});
    }
    for (const py::handle dict : empty) empty_.push_back(py::reinterpret_borrow<py::object>(dict));
    for (const py::handle tensor : tensors)
      tensors_.push_back(py::reinterpret_borrow<py::object>(tensor));
    for (const py::object& tensor : tensors_) seen_.push_back(look_at(tensor));
    if (by_contents_) hash_ = content();
  }

  // False too for tensors that cannot be looked at any more.
  bool holds(const py::object& owner) const {
    try {
      return is_as_it_was(owner);
    } catch (const py::error_already_set&) {
      return false;
    }
  }

  // Visits every object that is held, for Python's collector.
  template <class Visit>
  void each(Visit visit) {
    owner_.each(visit);
    for (auto& [object, module] : modules_) {
      visit(object);
      module.each(visit);
    }
    for (std::vector<Attribute>* all : {&attributes_, &items_}) {
      for (Attribute& a : *all) {
        visit(a.owner);
        visit(a.name);
        visit(a.value);
      }
    }
    for (py::object& dict : empty_) visit(dict);
    for (py::object& tensor : tensors_) visit(tensor);
  }

  void clear() {
    owner_address_ = nullptr;
    modules_.clear();
    attributes_.clear();
    items_.clear();
    empty_.clear();
    tensors_.clear();
    seen_.clear();
  }

 private:
  // An operation in place changes the version, `tensor.data = ...` one of the others. The tensor is
  // read where it lies in Python's object, and no reference to it is held: that would take several
  // attributes of each of dozens of tensors, and torch.utils.swap_tensors forbids references.
  struct Seen {
    unsigned long long version;
    const void* implementation;  // that the object points to
    const void* data;
    std::vector<int64_t> sizes, strides;
    int32_t dtype;
    size_t element_bytes;
  };

  const void* implementation_of(PyObject* tensor) const {
    return *reinterpret_cast<const void* const*>(place_of(tensor));
  }
  char* place_of(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + offset_; }

  unsigned long long version_of(PyObject* tensor) const {
    return by_contents_ ? 0 : number(PyObject_GetAttr(tensor, version_.ptr()));
  }

  Seen look_at(const py::object& tensor) const {
    const auto known = attribute(tensor.ptr(), py::str("_cdata"));
    const void* const implementation = implementation_of(tensor.ptr());
    if (PyLong_AsVoidPtr(known.ptr()) != implementation)
      throw std::invalid_argument("tensors: expected those that lie in Python's objects");
    const TensorFacts f = facts_of(place_of(tensor.ptr()));
    return {version_of(tensor.ptr()),
            implementation,
            f.data,
            {f.sizes, f.sizes + f.dim},
            {f.strides, f.strides + f.dim},
            f.dtype,
            static_cast<size_t>(number(PyObject_GetAttr(tensor.ptr(), py::str("itemsize").ptr())))};
  }

  bool is_as_seen(PyObject* tensor, const Seen& seen) const {
    if (implementation_of(tensor) != seen.implementation) return false;
    const TensorFacts f = facts_of(place_of(tensor));
    return f.data == seen.data && f.dtype == seen.dtype &&
           std::equal(f.sizes, f.sizes + f.dim, seen.sizes.begin(), seen.sizes.end()) &&
           std::equal(f.strides, f.strides + f.dim, seen.strides.begin(), seen.strides.end()) &&
           version_of(tensor) == seen.version;
  }

  bool is_as_it_was(const py::object& owner) const {
    if (owner.ptr() != owner_address_ || !owner_.is(owner.ptr())) return false;
    for (const auto& [object, module] : modules_) {
      if (!module.is(object.ptr())) return false;
    }
    for (const py::object& dict : empty_) {
      if (PyDict_Size(dict.ptr()) != 0) return false;
    }
    for (const Attribute& item : items_) {
      if (PyDict_GetItem(item.owner.ptr(), item.name.ptr()) != item.value.ptr()) return false;
    }
    for (const Attribute& a : attributes_) {
      if (!attribute(a.owner.ptr(), a.name).is(a.value)) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!is_as_seen(tensors_[i].ptr(), seen_[i])) return false;
    }
    return !by_contents_ || content() == hash_;
  }

  uint64_t content() const {
    std::vector<cpu::MemoryBlock> blocks;
    for (const Seen& seen : seen_) blocks.push_back({seen.data, bytes_of(seen)});
    return cpu::content_hash(blocks);
  }

  // Of a contiguous tensor.
  static size_t bytes_of(const Seen& seen) {
    size_t bytes = seen.element_bytes;
    for (const int64_t n : seen.sizes) bytes *= static_cast<size_t>(n);
    return bytes;
  }

  static py::object attribute(PyObject* object, const py::object& name) {
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
    if (!found) throw py::error_already_set();
    return found;
  }
  static unsigned long long number(PyObject* given) {
    const auto owned = py::reinterpret_steal<py::object>(given);
    if (!owned) throw py::error_already_set();
    return PyLong_AsUnsignedLongLongMask(owned.ptr());
  }

  const py::str version_{"_version"};
  const size_t offset_;
  const void* owner_address_;
  Module owner_;
  bool by_contents_;
  std::vector<std::pair<py::object, Module>> modules_;
  std::vector<Attribute> attributes_, items_;
  std::vector<py::object> empty_, tensors_;
  std::vector<Seen> seen_;
  uint64_t hash_ = 0;
};

bool is_constructed(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

}  // namespace

void bind_snapshot(py::module_& m) {
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      int result = 0;
      if (is_constructed(self)) {
        py::cast<Snapshot&>(py::handle(self)).each([&](const py::object& held) {
          if (result == 0 && held) result = visit(held.ptr(), arg);
        });
      }
      return result;
    };
    type->tp_clear = [](PyObject* self) {
      if (is_constructed(self)) py::cast<Snapshot&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<Snapshot>(m, "Snapshot", collected, "A record of all that packed weights depend on.")
      .def(py::init<const py::object&, const py::str&, const py::list&, const py::list&,
                    const py::list&, const py::list&, const py::list&, bool, size_t>(),
           py::arg("owner"), py::arg("own"), py::arg("modules"), py::arg("attributes"),
           py::arg("items"), py::arg("empty"), py::arg("tensors"), py::arg("by_contents"),
           py::arg("offset"))
      .def("holds", &Snapshot::holds, py::arg("owner"), "Whether nothing has changed.");
}

}  // namespace seqkernels

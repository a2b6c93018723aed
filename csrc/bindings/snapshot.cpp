// What a module's packed weights depend on, compared with what it was in a few microseconds: for
// packed weights are right only as long as nothing has changed.
#include "bindings/snapshot.h"

#include <utility>
#include <vector>

namespace py = pybind11;

namespace seqkernels {
namespace {

// A dictionary and the values that it held, in their order. Values are compared by identity, which
// finds every assignment.
class Dictionary {
 public:
  explicit Dictionary(py::dict dict) : dict_(std::move(dict)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict_.ptr(), &at, &key, &value);) {
      keys_.push_back(py::reinterpret_borrow<py::object>(key));
      values_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }

  bool holds() const {
    if (static_cast<size_t>(PyDict_Size(dict_.ptr())) != values_.size()) return false;
    PyObject *key = nullptr, *value = nullptr;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict_.ptr(), &at, &key, &value); ++i) {
      if (value != values_[i].ptr() || key != keys_[i].ptr()) return false;
    }
    return true;
  }

  template <class Visit>
  void each(Visit visit) {
    visit(dict_);
    for (py::object& key : keys_) visit(key);
    for (py::object& value : values_) visit(value);
  }

 private:
  py::dict dict_;
  std::vector<py::object> keys_, values_;
};

struct Attribute {
  py::object owner, name, value;
};

struct Item {
  py::dict owner;
  py::object name, value;
};

class Snapshot {
 public:
  // Of modules: their types, everything in their dictionaries, and in the dictionaries of
  // parameters, buffers, submodules and hooks there. `attributes` holds (owner, name) of class
  // attributes, `items` (dictionary, key) of globals, `empty` dictionaries that are to stay empty.
  Snapshot(const py::list& modules, const py::list& attributes, const py::list& items,
           const py::list& empty, const py::list& weights) {
    for (const py::handle module : modules) {
      types_.emplace_back(py::reinterpret_borrow<py::object>(module), Py_TYPE(module.ptr()));
      const py::dict own = module.attr("__dict__");
      dictionaries_.emplace_back(own);
      for (const char* name :
           {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}) {
        if (own.contains(name) && py::isinstance<py::dict>(own[name]))
          dictionaries_.emplace_back(own[name].cast<py::dict>());
      }
    }
    for (const py::handle pair : attributes) {
      const py::object owner = pair[py::int_(0)], name = pair[py::int_(1)];
      attributes_.push_back({owner, name, py::getattr(owner, name)});
    }
    for (const py::handle pair : items) {
      const py::dict owner = pair[py::int_(0)];
      const py::object name = pair[py::int_(1)];
      items_.push_back({owner, name, owner[name]});
    }
    for (const py::handle dict : empty) empty_.push_back(py::reinterpret_borrow<py::dict>(dict));
    for (const py::handle weight : weights) {
      weights_.push_back(py::reinterpret_borrow<py::object>(weight));
      seen_.push_back(look_at(weight.ptr()));
    }
  }

  bool holds() const {
    for (const auto& [object, type] : types_) {
      if (Py_TYPE(object.ptr()) != type) return false;
    }
    for (const Dictionary& dictionary : dictionaries_) {
      if (!dictionary.holds()) return false;
    }
    for (const py::dict& dict : empty_) {
      if (PyDict_Size(dict.ptr()) != 0) return false;
    }
    for (const Item& item : items_) {
      if (PyDict_GetItem(item.owner.ptr(), item.name.ptr()) != item.value.ptr()) return false;
    }
    for (const Attribute& a : attributes_) {
      const py::object now =
          py::reinterpret_steal<py::object>(PyObject_GetAttr(a.owner.ptr(), a.name.ptr()));
      if (!now) throw py::error_already_set();
      if (now.ptr() != a.value.ptr()) return false;
    }
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (look_at(weights_[i].ptr()) != seen_[i]) return false;
    }
    return true;
  }

  // Visits every object that is held: a module holds its snapshot, and Python's collector has to
  // see through it.
  template <class Visit>
  void each(Visit visit) {
    for (auto& [object, type] : types_) visit(object);
    for (Dictionary& dictionary : dictionaries_) dictionary.each(visit);
    for (py::dict& dict : empty_) visit(dict);
    for (Item& item : items_) {
      visit(item.owner);
      visit(item.name);
      visit(item.value);
    }
    for (Attribute& a : attributes_) {
      visit(a.owner);
      visit(a.name);
      visit(a.value);
    }
    for (py::object& weight : weights_) visit(weight);
  }

  void clear() {
    types_.clear();
    dictionaries_.clear();
    empty_.clear();
    items_.clear();
    attributes_.clear();
    weights_.clear();
  }

 private:
  // What an edit of a tensor changes: an operation in place its version, `tensor.data = ...` one of
  // the others. No reference to the tensor itself is held, which torch.utils.swap_tensors forbids.
  struct Seen {
    unsigned long long version, address, count;
    bool contiguous;
    bool operator==(const Seen&) const = default;
  };
  Seen look_at(PyObject* weight) const {
    return {number(PyObject_GetAttr(weight, version_.ptr())), called(weight, data_ptr_),
            called(weight, numel_), called(weight, is_contiguous_) != 0};
  }
  static unsigned long long called(PyObject* object, const py::str& method) {
    return number(PyObject_CallMethodNoArgs(object, method.ptr()));
  }
  static unsigned long long number(PyObject* given) {
    const py::object owned = py::reinterpret_steal<py::object>(given);
    if (!owned) throw py::error_already_set();
    return PyLong_AsUnsignedLongLongMask(owned.ptr());
  }

  std::vector<std::pair<py::object, PyTypeObject*>> types_;
  std::vector<Dictionary> dictionaries_;
  std::vector<py::dict> empty_;
  std::vector<Item> items_;
  std::vector<Attribute> attributes_;
  std::vector<py::object> weights_;
  std::vector<Seen> seen_;
  const py::str version_{"_version"}, data_ptr_{"data_ptr"}, numel_{"numel"},
      is_contiguous_{"is_contiguous"};
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
  py::class_<Snapshot>(m, "Snapshot", collected, "What packed weights depend on, as it was.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&>(),
           py::arg("modules"), py::arg("attributes"), py::arg("items"), py::arg("empty"),
           py::arg("weights"))
      .def("holds", &Snapshot::holds, "Whether nothing has changed.");
}

}  // namespace seqkernels

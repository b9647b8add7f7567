// Plugin fields: 32-bit integers by name, from whoever calls (the ONNX parser, Python, a serialized engine).
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "schema.h"

namespace runtime {

// One line on stderr: loggers differ in layout between TensorRT 10 and 11, so the plugin does not touch them.
template <class... Values>
void complain(char const* op, char const* format, Values... values) noexcept {
    char text[512];
    std::snprintf(text, sizeof text, format, values...);
    std::fprintf(stderr, "%s: %s\n", op, text);
}
inline void complain(char const* op, char const* text) noexcept { std::fprintf(stderr, "%s: %s\n", op, text); }

template <class Op>
using Attributes = std::array<int32_t, std::size(Op::kFields)>;

inline bool allows(schema::Field const& field, int64_t value) noexcept {
    for (int i = 0; i < field.choices; i++)
        if (field.allowed[i] == value) return true;
    return field.choices == 0 && value >= INT32_MIN && value <= INT32_MAX;
}

// Defaults, overridden by the fields that are there. False, and a line on stderr, for what the op does not allow.
template <class Op>
bool read_fields(nvinfer1::PluginFieldCollection const* given, Attributes<Op>& attributes) noexcept {
    for (size_t i = 0; i < attributes.size(); i++) attributes[i] = Op::kFields[i].value;
    for (int32_t f = 0; given && f < given->nbFields; f++) {
        nvinfer1::PluginField const& field = given->fields[f];
        size_t i = 0;
        while (i < attributes.size() && std::strcmp(field.name, Op::kFields[i].name) != 0) i++;
        if (i == attributes.size()) {
            complain(Op::kName, "unknown field '%s'", field.name);
            return false;
        }
        bool const is32 = field.type == nvinfer1::PluginFieldType::kINT32;
        if ((!is32 && field.type != nvinfer1::PluginFieldType::kINT64) || field.length != 1 || !field.data) {
            complain(Op::kName, "field '%s' must be one INT32 or INT64, found type %d, length %d", field.name,
                     int(field.type), int(field.length));
            return false;
        }
        int64_t value = 0;
        if (is32) {
            int32_t narrow = 0;
            std::memcpy(&narrow, field.data, sizeof narrow);
            value = narrow;
        } else {
            std::memcpy(&value, field.data, sizeof value);
        }
        if (!allows(Op::kFields[i], value)) {
            complain(Op::kName, "field '%s' is %lld, which this version does not take", field.name,
                     static_cast<long long>(value));
            return false;
        }
        attributes[i] = int32_t(value);
    }
    return true;
}

}  // namespace runtime

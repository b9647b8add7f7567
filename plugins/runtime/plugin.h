// IPluginV3 written once. An op supplies its generated schema and four functions:
//
//     static int32_t shape(Attributes, DimsExprs const* in, int32_t count, DimsExprs& out, IExprBuilder&)
//     static size_t workspace(Attributes, DynamicPluginTensorDesc const* in)
//     static bool describe(Attributes, Device&)
//     static int32_t launch(Attributes, Device, PluginTensorDesc const* in, void const* const* inputs, int32_t count,
//                           void* output, void* workspace, cudaStream_t)
//
// One source for TensorRT 10, 11 and RTX: only interfaces that did not change between them, nothing of TensorRT linked.
// Everything is noexcept and reports failure by its result; nothing is allocated while an engine runs, but by an op's
// first launch.
#pragma once

#include <new>

#include "field.h"

namespace runtime {

using namespace nvinfer1;

struct Device {
    int32_t sm = 0, multiprocessors = 0;
    int32_t library = 0;  // 1: what the op wants to call is there
};

template <class Op>
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Attributes<Op> const& attributes) noexcept : mAttributes(attributes) {
        for (size_t i = 0; i < mFields.size(); i++)
            mFields[i] = PluginField{Op::kFields[i].name, &mAttributes[i], PluginFieldType::kINT32, 1};
        size_t used = size_t(std::snprintf(mTimingId, sizeof mTimingId, "%s/%s", Op::kName, Op::kVersion));
        for (size_t i = 0; i < mFields.size() && used < sizeof mTimingId; i++)
            used += size_t(std::snprintf(mTimingId + used, sizeof mTimingId - used, "/%d", int(mAttributes[i])));
    }
    Plugin(Plugin const&) = delete;  // the field list points into this object
    Plugin& operator=(Plugin const&) = delete;

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE:
                return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD:
                return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME:
                return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        auto* const copy = new (std::nothrow) Plugin(mAttributes);
        if (copy) copy->mDevice = mDevice;
        return copy;
    }

    // IPluginV3OneCore
    AsciiChar const* getPluginName() const noexcept override { return Op::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Op::kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return schema::kDomain; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }
    int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in,
                               int32_t inputs) const noexcept override {
        if (inputs < Op::kRequiredInputs || inputs > Op::kInputs || outputs != 1) {
            complain(Op::kName, "expected %d to %d inputs and 1 output, found %d and %d", Op::kRequiredInputs,
                     Op::kInputs, inputs, outputs);
            return -1;
        }
        out[0] = in[0];
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* all, int32_t inputs,
                                   int32_t) noexcept override {
        if (all[position].desc.format != TensorFormat::kLINEAR) return false;
        for (auto const& row : Op::template kTypes<DataType>) {
            bool fits = true;
            for (int32_t i = 0; i <= position; i++)
                fits = fits && all[i].desc.type == row[i < inputs ? i : Op::kInputs + i - inputs];
            if (fits) return true;
        }
        return false;
    }
    int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t,
                            IExprBuilder& builder) noexcept override {
        return Op::shape(mAttributes, in, inputs, out[0], builder);
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return Op::workspace(mAttributes, in);
    }
    char const* getTimingCacheID() noexcept override { return mTimingId; }

    // IPluginV3OneRuntime
    int32_t onShapeChange(PluginTensorDesc const*, int32_t inputs, PluginTensorDesc const*, int32_t) noexcept override {
        mInputs = inputs;
        return 0;
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return Op::launch(mAttributes, mDevice, in, inputs, mInputs, outputs[0], workspace, stream);
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        auto* const copy = static_cast<Plugin*>(clone());
        if (!copy) return nullptr;
        if (!Op::describe(mAttributes, copy->mDevice)) {
            delete copy;
            return nullptr;
        }
        return copy;
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mCollection = {int32_t(mFields.size()), mFields.data()};
        return &mCollection;
    }
    int32_t setTactic(int32_t) noexcept override { return 0; }

private:
    Attributes<Op> mAttributes;
    std::array<PluginField, std::size(Op::kFields)> mFields{};
    PluginFieldCollection mCollection{};
    Device mDevice;       // of the context this object is attached to
    int32_t mInputs = 0;  // optional ports are the last; enqueue is not told how many there are
    char mTimingId[128] = {};
};

template <class Op>
class Creator final : public IPluginCreatorV3One {
public:
    Creator() noexcept {
        for (size_t i = 0; i < mFields.size(); i++)
            mFields[i] = PluginField{Op::kFields[i].name, &Op::kFields[i].value, PluginFieldType::kINT32, 1};
        mCollection = {int32_t(mFields.size()), mFields.data()};
    }
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        Attributes<Op> attributes{};
        return read_fields<Op>(fields, attributes) ? new (std::nothrow) Plugin<Op>(attributes) : nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    AsciiChar const* getPluginName() const noexcept override { return Op::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Op::kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return schema::kDomain; }

private:
    std::array<PluginField, std::size(Op::kFields)> mFields{};
    PluginFieldCollection mCollection{};
};

}  // namespace runtime

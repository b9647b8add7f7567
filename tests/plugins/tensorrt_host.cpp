// A host for the plugin library, built against one TensorRT's headers: what a builder and a runtime would ask of it.
// usage: host PLUGIN.so REGISTRY.so|- M N K FOLDER      int4, group 32, gated, SiLU, fp16, with bias; FOLDER holds
// x.bin, ... Prints one "name value" line for each thing that the Python test compares, and writes FOLDER/y.bin.
#include <NvInferImpl.h>
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Expression final : IDimensionExpr, apiv::VDimensionExpr {
    int64_t value;
    bool fixed;
    Expression(int64_t v, bool f) : value(v), fixed(f) { IDimensionExpr::mImpl = this; }
    bool isConstant() const override { return fixed; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
};

struct Expressions final : IExprBuilder, apiv::VExprBuilder {
    std::deque<Expression> pool;
    Expressions() { IExprBuilder::mImpl = this; }
    IDimensionExpr const* constant(int64_t v) override { return add(v, true); }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        std::abort();  // the plugin computes with constants only
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        std::abort();
    }
    IDimensionExpr const* add(int64_t v, bool fixed) {
        pool.emplace_back(v, fixed);
        return &pool.back();
    }
};

std::vector<char> read(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void require(bool holds, char const* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    std::exit(1);
}

Dims dims(std::vector<int64_t> const& sizes) {
    Dims d{};
    d.nbDims = int32_t(sizes.size());
    for (size_t i = 0; i < sizes.size(); i++) d.d[i] = sizes[i];
    return d;
}

}  // namespace

int main(int argc, char** argv) {
    require(argc == 7, "usage");
    int64_t const m = std::atoll(argv[3]), n = std::atoll(argv[4]), k = std::atoll(argv[5]);
    std::string const folder = argv[6];

    IPluginCreatorV3One* creator = nullptr;
    IPluginRegistry* registry = nullptr;
    IPluginRegistry::PluginLibraryHandle library = nullptr;
    if (std::strcmp(argv[2], "-") == 0) {
        void* const handle = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        require(handle, "dlopen of the plugin library");
        auto* const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
        require(get, "getCreators");
        int32_t count = 0;
        creator = static_cast<IPluginCreatorV3One*>(get(count)[0]);
        require(count == 1, "one creator");
    } else {
        void* const handle = dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL);
        require(handle, "dlopen of TensorRT");
        auto* const get = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(handle, "getPluginRegistry"));
        require(get, "getPluginRegistry");
        registry = get();
        library = registry->loadLibrary(argv[1]);
        require(library, "loadLibrary");
        creator = static_cast<IPluginCreatorV3One*>(registry->getCreator("WeightOnlyGemm", "1", "instantrt"));
        require(creator, "the registry finds the creator");
    }
    for (int32_t i = 0; i < creator->getFieldNames()->nbFields; i++)
        std::printf("field %s\n", creator->getFieldNames()->fields[i].name);

    auto create = [&](std::vector<PluginField> const& fields) {
        PluginFieldCollection const all{int32_t(fields.size()), fields.data()};
        return creator->createPlugin("node", &all, TensorRTPhase::kBUILD);
    };
    int32_t const bits = 4, group = 32, silu = 1, one = 1, two = 2;
    int64_t const wide_bits = 4;
    float const real = 1.0f;
    auto i32 = [](char const* name, int32_t const* value) {
        return PluginField{name, value, PluginFieldType::kINT32, 1};
    };
    require(!create({i32("layout_version", &two)}), "another layout version is refused");
    require(!create({i32("no_such", &one)}), "an unknown field is refused");
    require(!create({PluginField{"bits", &real, PluginFieldType::kFLOAT32, 1}}), "a float is refused");
    require(!create({i32("bits", &one)}), "a value that is not allowed is refused");
    auto* const plugin = create({PluginField{"bits", &wide_bits, PluginFieldType::kINT64, 1}, i32("group", &group),
                                 i32("activation", &silu), i32("gated", &one)});
    require(plugin, "createPlugin");
    (void)bits;

    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    std::printf("core %s %s %s\n", core->getPluginNamespace(), core->getPluginName(), core->getPluginVersion());
    DataType const types[] = {DataType::kHALF, DataType::kINT8, DataType::kHALF, DataType::kHALF};
    DataType out_type{};
    require(build->getOutputDataTypes(&out_type, 1, types, 4) == 0 && out_type == DataType::kHALF, "output type");
    require(build->getOutputDataTypes(&out_type, 1, types, 2) != 0, "two inputs are refused");

    Expressions e;
    auto shape = [&](std::vector<int64_t> const& sizes, size_t dynamic) {
        DimsExprs s{};
        s.nbDims = int32_t(sizes.size());
        for (size_t i = 0; i < sizes.size(); i++) s.d[i] = e.add(sizes[i], i >= dynamic);
        return s;
    };
    DimsExprs in[4] = {shape({1, m, k}, 2), shape({n / 16, (k + 63) / 64, 512}, 0), shape({k / group, 2 * n}, 0),
                       shape({n}, 0)};
    DimsExprs out{};
    require(build->getOutputShapes(in, 4, nullptr, 0, &out, 1, e) == 0, "output shape");
    std::printf("shape %d %lld %lld %lld\n", out.nbDims, (long long)out.d[0]->getConstantValue(),
                (long long)out.d[1]->getConstantValue(), (long long)out.d[2]->getConstantValue());
    require(!out.d[1]->isConstant() && out.d[2]->isConstant(), "leading axes stay dynamic");
    for (int32_t port = 0; port < 4; port++) {
        DimsExprs wrong[4] = {in[0], in[1], in[2], in[3]};
        int32_t const axis = wrong[port].nbDims - 1;
        wrong[port].d[axis] = e.add(wrong[port].d[axis]->getConstantValue() + 1, true);
        require(build->getOutputShapes(wrong, 4, nullptr, 0, &out, 1, e) != 0, "a wrong shape is refused");
    }

    std::vector<std::vector<int64_t>> const sizes = {
        {1, m, k}, {n / 16, (k + 63) / 64, 512}, {k / group, 2 * n}, {n}, {1, m, n / 2}};
    std::vector<DynamicPluginTensorDesc> all(5);
    for (size_t i = 0; i < 5; i++) {
        all[i].desc.dims = all[i].min = all[i].max = dims(sizes[i]);
        all[i].desc.type = i == 4 ? out_type : types[i];
        all[i].desc.format = TensorFormat::kLINEAR;
    }
    for (int32_t i = 0; i < 5; i++) require(build->supportsFormatCombination(i, all.data(), 4, 1), "legal formats");
    for (int32_t i = 0; i < 5; i++) {
        auto other = all;
        other[i].desc.type = DataType::kFLOAT;
        require(!build->supportsFormatCombination(i, other.data(), 4, 1), "another type is refused");
        other = all;
        other[i].desc.format = TensorFormat::kHWC8;
        require(!build->supportsFormatCombination(i, other.data(), 4, 1), "another format is refused");
    }
    size_t const workspace = build->getWorkspaceSize(all.data(), 4, &all[4], 1);
    std::printf("workspace %zu\n", workspace);
    std::printf("timing %s\n", build->getTimingCacheID());

    // what an engine file does
    auto* const runtime =
        static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto* const again = creator->createPlugin("node", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    require(again, "createPlugin from serialized fields");
    delete plugin;
    auto* const loaded =
        static_cast<IPluginV3OneRuntime*>(again->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto const* const fields = loaded->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; i++)
        std::printf("serialized %s %d\n", fields->fields[i].name, *static_cast<int32_t const*>(fields->fields[i].data));

    auto* const attached = loaded->attachToContext(nullptr);
    require(attached, "attachToContext");
    auto* const run =
        static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginTensorDesc descs[5];
    for (int i = 0; i < 5; i++) descs[i] = all[i].desc;
    require(run->onShapeChange(descs, 4, &descs[4], 1) == 0, "onShapeChange");
    struct alignas(16) Line {
        char bytes[16];
    };
    std::vector<Line> memory[4], y(m * n / 2 * 2 / 16), scratch(workspace / 16 + 1);
    char const* const names[] = {"x", "codes", "affine", "bias"};
    void const* inputs[4];
    for (int i = 0; i < 4; i++) {
        std::vector<char> const bytes = read(folder + "/" + names[i] + ".bin");
        memory[i].resize(bytes.size() / 16 + 1);
        std::memcpy(static_cast<void*>(memory[i].data()), bytes.data(), bytes.size());
        inputs[i] = memory[i].data();
    }
    void* outputs[] = {y.data()};
    require(run->enqueue(descs, &descs[4], inputs, outputs, scratch.data(), nullptr) == 0, "enqueue");
    std::ofstream(folder + "/y.bin", std::ios::binary)
        .write(reinterpret_cast<char*>(y.data()), std::streamsize(y.size() * 16));
    inputs[0] = reinterpret_cast<char const*>(inputs[0]) + 2;
    require(run->enqueue(descs, &descs[4], inputs, outputs, scratch.data(), nullptr) != 0, "a misaligned x is refused");
    descs[0].dims.d[1] = 0;
    require(run->enqueue(descs, &descs[4], inputs, outputs, scratch.data(), nullptr) == 0, "an empty batch is done");
    delete attached;
    delete again;
    if (registry) registry->deregisterLibrary(library);
    std::printf("done\n");
    return 0;
}

// Reading the file of measured choices, whatever it holds.
#include "choices.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <climits>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace wog {
namespace {

constexpr size_t kMostBytes = 1 << 20, kMostShown = 48;
constexpr int kMostSaid = 10;  // lines that are wrong

struct Column {
    char const* name;
    int64_t least, most;
};
constexpr Column kColumns[] = {
    {"sm", 1, 999},           {"multiprocessors", 1, 65536}, {"bits", 4, 8},
    {"group", 32, INT32_MAX}, {"activation_bits", 8, 16},    {"n", 16, INT32_MAX},
    {"k", 32, INT32_MAX},     {"max_m", 1, INT32_MAX},       {"row", 0, kRowCount - 1},  // by name
    {"splits", 1, 8}};
constexpr char kEvery[] = "sm multiprocessors bits group activation_bits n k max_m row splits";
constexpr size_t kColumnCount = std::size(kColumns), kRowColumn = 8;

using Key = std::array<int64_t, kRowColumn>;  // what stands before the row; max_m is the last of it
struct Line {
    Key when;
    Choice choice;
};

std::string path_of_file() {
    Dl_info found{};
    if (!dladdr(reinterpret_cast<void*>(&path_of_file), &found) || !found.dli_fname) return {};
    std::string path = found.dli_fname;
    if (path.size() > 3 && path.compare(path.size() - 3, 3, ".so") == 0) path.resize(path.size() - 3);
    char here[PATH_MAX];
    if (path[0] != '/' && getcwd(here, sizeof here)) path = std::string(here) + '/' + path;
    return path + ".choices";
}

// Found as the library is loaded: what dladdr says may be relative, and by the first launch the process may be elsewhere.
std::string const kPath = path_of_file();

void say(std::string const& path, int line, std::string const& expected, std::string_view found) {
    std::string shown(found.substr(0, kMostShown));
    for (char& c : shown)
        if (c < ' ' || c > '~') c = '?';
    std::fprintf(stderr, "WeightOnlyGemm: %s:%d: expected %s, found '%s'; ignored\n", path.c_str(), line,
                 expected.c_str(), shown.c_str());
}

int64_t value_of(std::string_view word, size_t column) {
    int64_t value = -1;
    if (column == kRowColumn) {
        for (int i = 0; i < kRowCount; i++)
            if (word == kRows[i].name) return i;
        return -1;
    }
    auto const [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    return error == std::errc() && end == word.data() + word.size() ? value : -1;
}

std::vector<Line> read(std::string const& path) {
    std::vector<Line> lines;
    struct stat about{};
    if (path.empty() || stat(path.c_str(), &about)) return lines;  // there is none
    std::ifstream file;
    if (S_ISREG(about.st_mode)) file.open(path, std::ios::binary);  // of a pipe it would wait
    std::string text(kMostBytes + 1, 0);                            // one byte more: to know that it is too large
    text.resize(size_t(file.read(text.data(), std::streamsize(text.size())).gcount()));
    bool const loaded = file.is_open() && !file.bad();
    if (!loaded || text.size() > kMostBytes) {
        say(path, 0, "a file of at most 1 MiB", loaded ? "more" : "what cannot be read");
        return lines;
    }
    int number = 0, wrong = 0;
    std::istringstream rest(text);
    for (std::string line; std::getline(rest, line);) {
        std::istringstream stream(line.substr(0, line.find('#')));
        std::vector<std::string> const words{std::istream_iterator<std::string>(stream), {}};
        number++;
        if (words.empty()) continue;
        Line found{};
        std::string expected = words.size() == kColumnCount ? "" : kEvery;
        std::string_view what = line;
        for (size_t i = 0; i < kColumnCount && expected.empty(); i++) {
            Column const& column = kColumns[i];
            int64_t const value = value_of(words[i], i);
            if (i < kRowColumn)
                found.when[i] = value;
            else
                (i == kRowColumn ? found.choice.row : found.choice.splits) = int32_t(value);
            if (column.least <= value && value <= column.most) continue;
            std::string const range = std::to_string(column.least) + " .. " + std::to_string(column.most);
            expected = i == kRowColumn ? "a row of the table of kernels" : std::string(column.name) + " of " + range;
            what = words[i];
        }
        if (expected.empty())
            lines.push_back(found);
        else if (++wrong <= kMostSaid)
            say(path, number, expected, what);
    }
    if (wrong > kMostSaid)
        std::fprintf(stderr, "WeightOnlyGemm: %s: and %d lines more\n", path.c_str(), wrong - kMostSaid);
    std::stable_sort(lines.begin(), lines.end(), [](Line const& a, Line const& b) { return a.when < b.when; });
    return lines;
}

}  // namespace

Choice measured_choice(wog_problem const& p) {
    static std::vector<Line> const lines = read(kPath);
    Key const wanted{p.sm, p.sm_count, p.bits, p.group, p.activation_bits, p.n, p.k, p.m};
    auto const at = std::lower_bound(lines.begin(), lines.end(), wanted,
                                     [](Line const& line, Key const& key) { return line.when < key; });
    bool const same = at != lines.end() && std::equal(wanted.begin(), wanted.end() - 1, at->when.begin());
    return same ? at->choice : Choice{-1, 0};
}

}  // namespace wog

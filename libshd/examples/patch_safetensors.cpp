// Patches a safetensors file in place, and takes the patch back exactly.
//
//     patch_safetensors apply  MODEL.safetensors DELTA.shd UNDO [STRENGTH]
//     patch_safetensors revert MODEL.safetensors DELTA.shd UNDO
//
// One tensor is in memory at a time. Everything is checked, and UNDO is written, before the model is touched; if the
// program is killed then, `revert` still gives the original, as it puts back all elements, changed or not.
#include <shd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string &what) { throw std::runtime_error(what); }

void must(int code, const std::string &what) {
    if (code != SHD_OK) fail(what + ": " + shd_error_name(code));
}

// ---- The header of a safetensors file ----

struct Entry {
    std::string dtype;
    std::vector<std::uint64_t> shape;
    std::uint64_t start = 0, end = 0;  // in the file
};

// Reads as much JSON as a header has: objects, lists, strings, numbers without sign or fraction. What it does not know
// it refuses, and it never looks behind the end.
class Parser {
public:
    explicit Parser(std::string_view text) : text_(text) {}

    std::map<std::string, Entry> header() {
        std::map<std::string, Entry> entries;
        object([&](const std::string &name) {
            if (name == "__metadata__") {
                object([&](const std::string &) { string(); });
            } else if (!entries.emplace(name, entry()).second) {
                fail("a tensor's name stands there twice");
            }
        });
        if (peek() != '\0') fail("something follows the header's JSON");
        return entries;
    }

private:
    // The next character that is no space; '\0' at the end.
    char peek() {
        while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr && text_[at_] != '\0') at_++;
        return at_ < text_.size() ? text_[at_] : '\0';
    }

    bool accept(char c) {
        if (peek() != c || at_ == text_.size()) return false;
        at_++;
        return true;
    }

    void expect(char c) {
        if (!accept(c)) fail(std::string("the header's JSON lacks a ") + c);
    }

    template <typename Visit> void object(Visit visit) {
        expect('{');
        if (accept('}')) return;
        do {
            std::string key = string();
            expect(':');
            visit(key);
        } while (accept(','));
        expect('}');
    }

    std::vector<std::uint64_t> numbers() {
        std::vector<std::uint64_t> list;
        expect('[');
        if (accept(']')) return list;
        do list.push_back(number());
        while (accept(','));
        expect(']');
        return list;
    }

    std::uint64_t number() {
        constexpr auto most = std::numeric_limits<std::uint64_t>::max();
        if (peek() < '0' || peek() > '9') fail("the header's JSON lacks a number");
        std::uint64_t value = 0;
        for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; at_++) {
            auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
            if (value > (most - digit) / 10) fail("a number of the header is too large");
            value = 10 * value + digit;
        }
        return value;
    }

    std::string string() {
        std::string result;
        expect('"');
        for (;;) {
            if (at_ == text_.size()) fail("a string of the header has no end");
            char c = text_[at_++];
            if (c == '"') return result;
            if (c == '\\') {
                escape(result);
            } else {
                result += c;
            }
        }
    }

    void escape(std::string &result) {
        static constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        char c = at_ < text_.size() ? text_[at_++] : '\0';
        if (auto which = names.find(c); which != names.npos) {
            result += meanings[which];
        } else if (c == 'u') {
            std::uint32_t code = hexadecimal();
            if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
                at_ += 2;
                code = 0x10000 + ((code - 0xD800) << 10) + ((hexadecimal() - 0xDC00) & 0x3FF);
            }
            append_utf8(result, code);
        } else {
            fail("a string of the header has an escape that JSON does not know");
        }
    }

    std::uint32_t hexadecimal() {
        std::uint32_t value = 0;
        for (int i = 0; i < 4; i++) {
            static constexpr std::string_view digits = "0123456789abcdef0123456789ABCDEF";
            auto digit = at_ < text_.size() ? digits.find(text_[at_++]) : digits.npos;
            if (digit == digits.npos) fail("a string of the header has a bad \\u");
            value = value << 4 | static_cast<std::uint32_t>(digit & 15);
        }
        return value;
    }

    static void append_utf8(std::string &result, std::uint32_t code) {
        auto put = [&](std::uint32_t byte) { result += static_cast<char>(byte); };
        if (code < 0x80) return put(code);
        if (code < 0x800) {
            put(0xC0 | code >> 6);
        } else {
            if (code < 0x10000) {
                put(0xE0 | code >> 12);
            } else {
                put(0xF0 | code >> 18);
                put(0x80 | (code >> 12 & 0x3F));
            }
            put(0x80 | (code >> 6 & 0x3F));
        }
        put(0x80 | (code & 0x3F));
    }

    Entry entry() {
        Entry e;
        object([&](const std::string &key) {
            if (key == "dtype") {
                e.dtype = string();
            } else if (key == "shape") {
                e.shape = numbers();
            } else if (key == "data_offsets") {
                auto offsets = numbers();
                if (offsets.size() != 2) fail("data_offsets of the header are not two");
                e.start = offsets[0];
                e.end = offsets[1];
            } else {
                fail("the header has an unknown field " + key);
            }
        });
        return e;
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

int dtype_of(const std::string &name) {
    static const std::map<std::string, int> ids = {
        {"F32", SHD_F32}, {"F16", SHD_F16}, {"BF16", SHD_BF16}, {"F64", SHD_F64},
        {"F8_E4M3", SHD_F8_E4M3}, {"F8_E5M2", SHD_F8_E5M2}, {"F8_E8M0", SHD_F8_E8M0}, {"BOOL", SHD_BOOL},
        {"U8", SHD_U8}, {"I8", SHD_I8}, {"U16", SHD_U16}, {"I16", SHD_I16},
        {"U32", SHD_U32}, {"I32", SHD_I32}, {"U64", SHD_U64}, {"I64", SHD_I64},
    };
    auto found = ids.find(name);
    return found == ids.end() ? SHD_UNSPECIFIED : found->second;
}

// ---- Files ----

using Bytes = std::vector<char>;
using Words = std::vector<std::uint64_t>;  // aligned to any element

std::size_t words_for(std::uint64_t bytes) { return static_cast<std::size_t>(bytes / 8 + (bytes % 8 != 0)); }

void read_at(std::istream &stream, std::uint64_t offset, void *data, std::uint64_t size, const std::string &what) {
    stream.seekg(static_cast<std::streamoff>(offset));
    if (!stream.read(static_cast<char *>(data), static_cast<std::streamsize>(size))) fail(what + ": cannot be read");
}

std::uint64_t size_of(std::istream &stream, const std::string &what) {
    stream.seekg(0, std::ios::end);
    auto size = stream.tellg();
    if (!stream || size < 0) fail(what + ": cannot be read");
    return static_cast<std::uint64_t>(size);
}

Bytes read_all(const std::string &path) {
    std::ifstream stream(path, std::ios::binary);
    Bytes bytes(size_of(stream, path));
    read_at(stream, 0, bytes.data(), bytes.size(), path);
    return bytes;
}

class Model {
public:
    explicit Model(const std::string &path)
        : path_(path), stream_(path, std::ios::binary | std::ios::in | std::ios::out) {
        std::uint64_t size = size_of(stream_, path), header_size = 0;
        if (size < 8) fail(path + ": is no safetensors file");
        read_at(stream_, 0, &header_size, 8, path);
        if (header_size > size - 8 || header_size > 100'000'000) fail(path + ": is no safetensors file");
        std::string header(header_size, '\0');
        read_at(stream_, 8, header.data(), header_size, path);
        entries_ = Parser(header).header();
        std::map<std::uint64_t, std::uint64_t> taken;  // start -> end
        for (auto &[name, e] : entries_) {
            if (e.start > e.end || e.end > size - 8 - header_size) fail(name + ": does not lie in the file");
            e.start += 8 + header_size;
            e.end += 8 + header_size;
            if (e.start < e.end && !taken.emplace(e.start, e.end).second) fail(name + ": shares its bytes");
        }
        std::uint64_t last_end = 0;
        for (auto [start, end] : taken) {
            if (start < last_end) fail(path + ": tensors share bytes");
            last_end = end;
        }
    }

    // The weights that a delta's tensor is for, once it is certain that they fit.
    std::pair<Words, Entry> weights(const shd_tensor &tensor, const std::string &name) {
        auto found = entries_.find(name);
        if (found == entries_.end()) fail(name + ": is not in " + path_);
        const Entry &e = found->second;
        std::vector<std::uint64_t> shape(tensor.dims, tensor.dims + tensor.rank);
        std::uint32_t element = shd_dtype_size(dtype_of(e.dtype));
        if (element == 0) fail(name + ": has the dtype " + e.dtype);
        if (e.shape != shape || (e.end - e.start) % element != 0 || (e.end - e.start) / element != tensor.numel) {
            fail(name + ": has another shape");
        }
        Words words(words_for(e.end - e.start));
        read_at(stream_, e.start, words.data(), e.end - e.start, path_);
        return {std::move(words), e};
    }

    void write(const Entry &e, const Words &words) {
        stream_.seekp(static_cast<std::streamoff>(e.start));
        stream_.write(reinterpret_cast<const char *>(words.data()), static_cast<std::streamsize>(e.end - e.start));
        if (!stream_.flush()) fail(path_ + ": cannot be written; `revert` gives the original");
    }

private:
    std::string path_;
    std::fstream stream_;
    std::map<std::string, Entry> entries_;
};

// ---- Patching ----

class Delta {
public:
    explicit Delta(const std::string &path) : bytes_(read_all(path)) {
        must(shd_open(&file_, bytes_.data(), bytes_.size(), nullptr), path);
    }

    // Each tensor in turn, made ready.
    template <typename Visit> void each(Visit visit) const {
        for (std::uint32_t number = 0; number < file_.tensor_count; number++) {
            shd_tensor tensor;
            shd_delta delta;
            must(shd_tensor_at(&file_, number, &tensor, nullptr), "the delta");
            std::string name(tensor.name, tensor.name_size);
            must(shd_load(&file_, number, SHD_CHECK_ALL, nullptr, 0, &delta, nullptr), name);
            if (tensor.op == SHD_OP_NEW || tensor.op == SHD_OP_DROP || tensor.op == SHD_OP_REPLACE)
                fail(name + ": would come or go, not be patched");
            visit(delta, name);
        }
    }

private:
    Bytes bytes_;
    shd_file file_;
};

shd_weights target_of(Words &words, const shd_tensor &tensor, const Entry &e) {
    return {words.data(), 0, tensor.numel, dtype_of(e.dtype), 0};
}

std::uint64_t saved_size(const shd_tensor &tensor, const Entry &e) {
    return tensor.nnz * shd_dtype_size(dtype_of(e.dtype));
}

void check_base(const shd_delta &delta, const shd_weights &target, const std::string &name) {
    std::uint64_t fingerprint = 0;
    must(shd_fingerprint(&delta, &target, 0, delta.block_count, &fingerprint, nullptr), name);
    if (delta.tensor.flags & SHD_HAS_BASE_FINGERPRINT && fingerprint != delta.tensor.base_fingerprint) {
        fail(name + ": is not what the delta was made against, or is patched already");
    }
}

// Patches everything twice: in memory alone, to find out whether it works and what it overwrites, and then for good.
void apply(Model &model, const Delta &deltas, double strength, const std::string &undo_path) {
    if (std::filesystem::exists(undo_path)) fail(undo_path + ": is there already; it may be the way back");
    Bytes undo;
    deltas.each([&](const shd_delta &delta, const std::string &name) {
        auto [words, e] = model.weights(delta.tensor, name);
        shd_weights target = target_of(words, delta.tensor, e);
        check_base(delta, target, name);
        Words saved(words_for(saved_size(delta.tensor, e)));
        must(shd_apply(&delta, &target, strength, 0, delta.block_count, saved.data(), nullptr), name);
        auto bytes = reinterpret_cast<const char *>(saved.data());
        undo.insert(undo.end(), bytes, bytes + saved_size(delta.tensor, e));
    });
    std::ofstream stream(undo_path, std::ios::binary);
    stream.write(undo.data(), static_cast<std::streamsize>(undo.size()));
    stream.close();
    if (!stream) fail(undo_path + ": cannot be written");
    deltas.each([&](const shd_delta &delta, const std::string &name) {
        auto [words, e] = model.weights(delta.tensor, name);
        shd_weights target = target_of(words, delta.tensor, e);
        must(shd_apply(&delta, &target, strength, 0, delta.block_count, nullptr, nullptr), name);
        model.write(e, words);
    });
}

void revert(Model &model, const Delta &deltas, const std::string &undo_path) {
    Bytes undo = read_all(undo_path);
    std::uint64_t needed = 0, at = 0;
    deltas.each([&](const shd_delta &delta, const std::string &name) {
        needed += saved_size(delta.tensor, model.weights(delta.tensor, name).second);
    });
    if (needed != undo.size()) fail(undo_path + ": is not of this delta and this model");
    deltas.each([&](const shd_delta &delta, const std::string &name) {
        auto [words, e] = model.weights(delta.tensor, name);
        shd_weights target = target_of(words, delta.tensor, e);
        std::uint64_t size = saved_size(delta.tensor, e);
        Words saved(words_for(size) + 1);
        std::memcpy(saved.data(), undo.data() + at, size);
        at += size;
        must(shd_revert(&delta, &target, 0, delta.block_count, saved.data(), nullptr), name);
        model.write(e, words);
    });
}

}  // namespace

int main(int count, char **arguments) {
    std::string action = count > 1 ? arguments[1] : "";
    if ((action != "apply" || count < 5 || count > 6) && (action != "revert" || count != 5)) {
        std::cerr << "usage: patch_safetensors apply MODEL.safetensors DELTA.shd UNDO [STRENGTH]\n"
                     "       patch_safetensors revert MODEL.safetensors DELTA.shd UNDO\n";
        return 2;
    }
    try {
        Model model(arguments[2]);
        Delta deltas(arguments[3]);
        if (action == "apply") {
            apply(model, deltas, count == 6 ? std::stod(arguments[5]) : 1.0, arguments[4]);
        } else {
            revert(model, deltas, arguments[4]);
        }
    } catch (const std::exception &error) {
        std::cerr << "patch_safetensors: " << error.what() << "\n";
        return 1;
    }
}

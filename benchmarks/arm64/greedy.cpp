// What llama.cpp would say next after a prompt and after every token that another llama.cpp said: prints the ids and
// logits of the best and the second best token, and a digest of all logits. Up to the first one that differs, that is greedy decoding.
// Usage: greedy MODEL ID,ID,... ID,ID,...  (-1 stands for what it said itself)
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static std::vector<llama_token> read(char * at) {
    std::vector<llama_token> ids;
    while (*at) {
        ids.push_back((llama_token) strtol(at, &at, 10));
        if (*at == ',') at++;
    }
    return ids;
}

// FNV-1a of the bits of all logits.
static unsigned long long digest(const float * logits, int count) {
    unsigned long long hash = 1469598103934665603ull;
    for (int i = 0; i < count; i++) {
        unsigned int bits;
        memcpy(&bits, logits + i, sizeof bits);
        hash = (hash ^ bits) * 1099511628211ull;
    }
    return hash;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL ID,ID,... ID,ID,...\n", argv[0]);
        return 2;
    }
    std::vector<llama_token> ids = read(argv[2]);
    std::vector<llama_token> said = read(argv[3]);

    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t) (ids.size() + said.size());
    params.n_threads = params.n_threads_batch = 1;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 1;

    fprintf(stderr, "%s\n", llama_print_system_info());
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch batch = llama_batch_get_one(ids.data(), (int32_t) ids.size());
    for (llama_token & next : said) {
        if (llama_decode(context, batch)) return 1;
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token best = 0, second = 1;
        for (llama_token id = 1; id < vocab; id++) {
            if (logits[id] > logits[best]) {
                second = best;
                best = id;
            } else if (id > 1 && logits[id] > logits[second]) {
                second = id;
            }
        }
        printf("%d %.6f %d %.6f %016llx\n", best, logits[best], second, logits[second], digest(logits, vocab));
        fflush(stdout);
        if (next < 0) next = best;
        batch = llama_batch_get_one(&next, 1);
    }
    return 0;
}

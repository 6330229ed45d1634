"""Methods under the names that a paper, its artifact or an engine has for them."""

NAMED = {
    "paper:kivi": "kivi:bits=4",
    "paper:gear": "gear:bits=4,outliers=0.02,rank=0.02",
    "paper:h2o": "h2o:heavy=64,recent=448",
    "paper:streaming-llm": "streaming-llm:budget=512,sinks=64",
    "artifact:kivi": "kivi:bits=4,order=after",
    "artifact:gear": "gear:bits=8,outliers=0.02,rank=0.02,order=after",
    "artifact:h2o": "h2o:heavy=2040,recent=8",
    "artifact:streaming-llm": "streaming-llm:budget=2048",
    "vllm:turboquant_4bit_nc": "turboquant:bits=k4v4,skip_first=2,skip_last=2",
    "vllm:turboquant_k3v4_nc": "turboquant:bits=k3v4,skip_first=2,skip_last=2",
    "vllm:turboquant_3bit_nc": "turboquant:bits=k3v3,skip_first=2,skip_last=2",
    "vllm:turboquant_k8v4": "turboquant:bits=k8v4,skip_first=2,skip_last=2",
    "llama.cpp:q8_0": "q8_0:rotate=hadamard",
    "llama.cpp:q4_0": "q4_0:rotate=hadamard",
    "lmdeploy:42": "turboquant:bits=k4v2",
}
"""paper: Gao et al. 2025, arXiv 2503.24000, appendix A.3. artifact: what its accuracy data were made with
(LLMkvsys/rethink-kv-compression, 1_neg_*_eval.sh, load_model_tokenizer.py). vllm: values of --kv-cache-dtype.
llama.cpp: values of --cache-type-k and --cache-type-v, which are rotated since llama.cpp#21038. lmdeploy: values of
quant_policy."""

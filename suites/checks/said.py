"""What servers say, and what should be read from it: real lines and pages, where a comment does not say otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Said:
    """What a server says: its log, its pages, and what should be read from them."""

    profile: str
    log: str
    facts: dict[str, object]
    compressed: bool | None
    features: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

    async def get(self, path: str) -> tuple[int, str]:
        return (200, self.pages[path]) if path in self.pages else (404, "Not Found")


LLAMA_METRICS = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 635
# HELP llamacpp:prompt_tokens_cached_total Number of prompt tokens reused from the cache
# TYPE llamacpp:prompt_tokens_cached_total counter
llamacpp:prompt_tokens_cached_total 316
llamacpp:spec_decode_num_draft_tokens_total 0
llamacpp:spec_decode_num_accepted_tokens_total 0
"""
# Made from the source of SGLang 0.5.23: http_server.server_info, ServerArgs, metrics_collector.
SGLANG_INFO = {
    "kv_cache_dtype": "fp8_e4m3",
    "page_size": 1,
    "max_total_num_tokens": 454112,
    "chunked_prefill_size": 8192,
    "disable_radix_cache": False,
    "attention_backend": "flashinfer",
    "speculative_algorithm": "EAGLE",
    "disable_overlap_schedule": True,
    "cuda_graph_config": {"decode": {"backend": "full", "bs": [1, 2]}, "prefill": {"backend": "disabled"}},
    "version": "0.5.23",
}
SGLANG_OLD = {"version": "0.5.5", "page_size": 64, "max_total_num_tokens": 2086558, "disable_cuda_graph": True}
SGLANG_FEATURES = {
    "radix cache disabled": "False",
    "chunked prefill": "8192",
    "attention backend": "flashinfer",
    "speculative decoding": "EAGLE",
    "overlapped scheduling disabled": "True",
}
SGLANG_METRICS = """\
sglang:max_total_num_tokens{engine_type="unified",model_name="m",tp_rank="0"} 454112.0
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 3.0
sglang:prompt_tokens_total{is_streaming="True",model_name="m"} 1.2e+06
sglang:prompt_tokens_total{is_streaming="False",model_name="m"} 40.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 1000.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 24.0
"""
LMDEPLOY_METRICS = """\
lmdeploy:prompt_tokens_total{engine="0",model_name="m"} 635.0
lmdeploy:cached_tokens_total{engine="0",model_name="m"} 316.0
lmdeploy:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 0.0
lmdeploy:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 0.0
"""
VLLM_METRICS = """\
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="/root/smollm2"} 0.0
vllm:num_preemptions_created{engine="0",model_name="/root/smollm2"} 1.7952695034372735e+09
vllm:prefix_cache_queries_total{engine="0",model_name="/root/smollm2"} 40.0
vllm:prefix_cache_hits_total{engine="0",model_name="/root/smollm2"} 0.0
vllm:cache_config_info{_block_size_resolved="True",block_size="128",cache_dtype="fp8_e4m3",enable_prefix_caching="True",\
engine="0",kv_cache_dtype_skip_layers="[]",kv_cache_memory_bytes="1073741824",kv_cache_size_tokens="93184",\
num_cpu_blocks="None",num_gpu_blocks="728"} 1.0
"""
VLLM_PRESSED = (
    VLLM_METRICS.replace("fp8_e4m3", "auto")
    .replace('"128"', '"32"')
    .replace('"93184"', '"2304"')
    .replace('num_gpu_blocks="728"', 'num_gpu_blocks="72",num_gpu_blocks_override="72"')
)

SERVERS = {
    "llama-server, f16, two slots": Said(
        "llama-cpp",
        """\
0.00.004.902 I srv          init: build_info: b0-unknown
0.01.108.730 I llama_context: n_ctx                 = 4096
0.01.108.731 I llama_context: n_ctx_seq             = 2048
0.01.108.732 I llama_context: flash_attn            = auto
0.01.108.733 I llama_context: kv_unified            = false
0.01.108.738 I llama_context: n_ctx_seq (2048) < n_ctx_train (8192) -- the full capacity of the model
0.01.312.035 I llama_kv_cache: size =   90.00 MiB (  2048 cells,  30 layers,  2/2 seqs), \
K (f16):   45.00 MiB, V (f16):   45.00 MiB
0.01.314.058 I resolve_fused_ops: Flash Attention enabled
0.01.521.490 I srv    load_model: prompt cache is enabled, size limit: 8192 MiB
""",
        {"version": "b0-unknown", "kv_dtype": "f16", "kv_tokens": 4096, "kv_bytes": 94371840, "max_len": 2048},
        False,
        {"flash attention": "enabled", "slots": "2", "unified cache": "false", "prompt cache": "enabled"}
        | {"speculative decoding": "False"},
        {
            "/props": '{"default_generation_settings":{"n_ctx":2048},"total_slots":2,"build_info":"b0-unknown"}',
            "/slots": '[{"id":0,"n_ctx":2048,"speculative":false,"is_processing":false}]',
            "/metrics": LLAMA_METRICS,
        },
    ),
    "llama-server, q8_0, one cache for four slots": Said(
        "llama-cpp",
        """\
0.03.603.998 I llama_context: n_ctx                 = 4096
0.03.604.012 I llama_context: n_ctx_seq             = 4096
0.03.604.069 I llama_context: flash_attn            = enabled
0.03.604.082 I llama_context: kv_unified            = true
0.03.782.941 I llama_kv_cache: size =   47.81 MiB (  4096 cells,  30 layers,  4/1 seqs), \
K (q8_0):   23.91 MiB, V (q8_0):   23.91 MiB
0.04.105.025 I slot   load_model: id  0 | task -1 | new slot, n_ctx = 4096
""",
        {"kv_dtype": "q8_0", "kv_tokens": 4096, "kv_bytes": 50132419, "max_len": 4096},
        True,
        {"flash attention": "enabled", "unified cache": "true"},
    ),
    "llama_cpp.server, V alone quantized": Said(
        "llama-cpp",
        """\
llama_context: n_ctx                 = 4096
llama_context: flash_attn            = enabled
llama_kv_cache: size =   68.91 MiB (  4096 cells,  30 layers,  1/1 seqs), K (f16):   45.00 MiB, V (q8_0):   23.91 MiB
""",
        {"version": "0.3.36", "kv_dtype": "f16/q8_0", "kv_tokens": 4096, "kv_bytes": 72257372},
        True,
        {"flash attention": "enabled"},
        {"/openapi.json": '{"openapi":"3.1.0","info":{"title":"llama.cpp Python API","version":"0.3.36"}}'},
    ),
    "llama-server of 2025, as a user posted": Said(
        "llama-cpp",
        "llama_init_from_model: KV self size  =  144.00 MiB, K (f16):   72.00 MiB, V (f16):   72.00 MiB\n",
        {"kv_dtype": "f16", "kv_bytes": 150994944},
        False,
    ),
    "llama-server without -lv 4": Said("llama-cpp", "0.01.961.913 I srv init: listening on http://\n", {}, None),
    # The pools' lines were posted by users; the last is of a draft model and was given another dtype.
    "SGLang, fp8 with a bf16 draft": Said(
        "sglang",
        """\
[2026-09-12 00:22:01] server_args={'model_path': 'm', 'kv_cache_dtype': 'fp8_e4m3'}
[2026-09-12 00:22:48 TP0] KV Cache is allocated. dtype: torch.float8_e4m3fn, #tokens: 454112, K size: 3.46 GB, \
V size: 3.46 GB
[2026-09-12 00:22:48 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 454112, K size: 1.08 GB, \
V size: 1.08 GB
""",
        {"version": "0.5.23", "kv_dtype": "float8_e4m3fn", "kv_tokens": 454112, "block_size": 1},
        True,
        {"CUDA graphs": "full"} | SGLANG_FEATURES,
        {"/server_info": json.dumps(SGLANG_INFO), "/metrics": SGLANG_METRICS},
    ),
    "SGLang, bf16, of November 2025 and June 2026": Said(
        "sglang",
        """\
[2025-11-30 12:50:10] Using KV cache dtype: torch.bfloat16
[2025-11-30 12:50:10] KV Cache is allocated. #tokens: 2243474, K size: 59.91 GB, V size: 59.91 GB
[2026-06-28 15:16:45] max_total_num_tokens=2086558, chunked_prefill_size=8192, max_prefill_tokens=16384, \
max_running_requests=33, context_len=256000, available_gpu_mem=17.22 GB
[2026-07-01 15:19:55 TP5] Tree cache initialized: source=default impl=ChunkCache hybrid_swa=False hybrid_ssm=False
""",
        {"version": "0.5.5", "kv_dtype": "bfloat16", "kv_tokens": 2086558, "max_len": 256000, "block_size": 64},
        False,
        {"prefix caching": "ChunkCache", "CUDA graphs disabled by option": "True"} | SGLANG_FEATURES,
        {"/get_server_info": json.dumps({**SGLANG_INFO, **SGLANG_OLD})},
    ),
    "SGLang behind a gateway that shows /metrics alone": Said(
        "sglang",
        "",
        {"kv_tokens": 2086558},
        None,
        pages={"/metrics": SGLANG_METRICS.replace(" 454112.0", " 2.086558e+06")},
    ),
    "LMDeploy, TurboMind, int4, as a user posted": Said(
        "lmdeploy",
        """\
[TM][INFO] [BlockManager] block_size = 0.844 MB
[TM][INFO] [BlockManager] max_block_count = 1740
2025-09-09 09:54:12,461 - lmdeploy - INFO - async_engine.py:285 - updated backend_config=TurbomindEngineConfig(\
dtype='auto', tp=1, session_len=131072, max_batch_size=128, cache_max_entry_count=0.8, cache_chunk_size=-1, \
cache_block_seq_len=64, enable_prefix_caching=True, quant_policy=4, rope_scaling_factor=0.0, enable_metrics=False)
""",
        {"kv_dtype": 4, "kv_blocks": 1740, "block_size": 64, "kv_tokens": 111360, "max_len": 131072},
        True,
        {"engine": "Turbomind", "prefix caching": "True"},
    ),
    # Made from the source: the dataclasses print themselves, the first before blocks are counted.
    "LMDeploy, PyTorch, uncompressed": Said(
        "lmdeploy",
        """\
2026-08-21 09:00:00,000 - lmdeploy - INFO - async_engine.py:131 - speculative_config=None
2026-08-21 09:00:09,000 - lmdeploy - INFO - base.py:456 - Building CacheEngine with config:
CacheConfig(max_batches=256, block_size=64, num_cpu_blocks=0, num_gpu_blocks=2791, kernel_block_size=64, \
enable_prefix_caching=False, quant_policy=<QuantPolicy.NONE: 0>, device_type='cuda').
2026-08-21 09:00:12,000 - lmdeploy - INFO - async_engine.py:165 - updated backend_config=PytorchEngineConfig(\
dtype='auto', session_len=8192, block_size=64, kernel_block_size=32, num_cpu_blocks=0, num_gpu_blocks=0, \
enable_prefix_caching=False, eager_mode=False, quant_policy=<QuantPolicy.NONE: 0>, enable_metrics=True)
""",
        {"kv_dtype": "NONE", "kv_blocks": 2791, "block_size": 64, "kv_tokens": 178624, "max_len": 8192},
        False,
        {"engine": "Pytorch", "prefix caching": "False", "eager mode": "False", "speculative decoding": "None"},
        {"/metrics": LMDEPLOY_METRICS},
    ),
    "LMDeploy before 2026, uncompressed": Said(
        "lmdeploy",
        "Object cache budget: 1024.50 MB from free 1280.63 MB and ratio 0.800\n"
        "updated backend_config=TurbomindEngineConfig(cache_block_seq_len=64, quant_policy=0)\n",
        {"kv_dtype": 0, "kv_bytes": 1074266112, "block_size": 64},
        False,
        {"engine": "Turbomind"},
    ),
    # The first and the last line are of the model server (posted, from the source), the others of GenAI 2026.4.1.
    "OpenVINO, f16": Said(
        "openvino",
        """\
[2026-08-05 19:10:41.637][1][serving][info][server.cpp:115] OpenVINO Model Server 2026.3.0.6f3df706b
SchedulerConfig {
  dynamic_split_fuse: true
  use_cache_eviction: false
  enable_prefix_caching: true
  use_sparse_attention: false
 }
Model: LLM with Paged Attention
  INFERENCE_PRECISION_HINT: bf16
  EXECUTION_DEVICES: CPU
  KV_CACHE_PRECISION: f16
  KEY_CACHE_PRECISION: f16
  VALUE_CACHE_PRECISION: f16
Model: OV Tokenizer
  KV_CACHE_PRECISION: u8
  KEY_CACHE_PRECISION: u8
  VALUE_CACHE_PRECISION: u8
[llm_executor][info][llm_executor.hpp:104] All requests: 1; Scheduled requests: 1; \
Cache type: static, cache usage: 18.6% of 1022.4 MB;
""",
        {"version": "2026.3.0.6f3df706b", "kv_dtype": "f16", "kv_bytes": 1072064102},
        False,
        {"prefix caching": "true", "chunked prefill": "true", "cache eviction": "false", "sparse attention": "false"}
        | {"inference precision": "bf16", "device": "CPU"},
        {"/metrics": 'ovms_requests_success{api="V3",interface="REST",method="Unary",name="m"} 1\n'},
    ),
    "OpenVINO, which says nothing, stores u8": Said(
        "openvino", "OpenVINO GenAI backend 2026.3.0.0-3277", {"version": "2026.3.0.0-3277"}, True
    ),
    "vLLM, fp8": Said(
        "vllm",
        """\
(APIServer pid=22805) INFO 11-21 13:57:42 [model.py:2152] Using max model len 2048
(APIServer pid=22805) INFO 11-21 13:57:42 [cache.py:361] Using fp8_e4m3 data type to store kv cache. It reduces the GPU
(EngineCore pid=22852) INFO 11-21 13:58:17 [kv_cache_utils.py:2327] CPU KV cache size: 93,184 tokens, Maximum
""",
        {"version": "0.32.0", "kv_dtype": "fp8_e4m3", "kv_tokens": 93184, "kv_bytes": 1 << 30, "block_size": 128}
        | {"max_len": 2048},
        True,
        {"prefix caching": "True"},
        {"/version": '{"version":"0.32.0"}', "/metrics": VLLM_METRICS},
    ),
    "vLLM, auto": Said(
        "vllm",
        """\
(APIServer pid=9872) INFO 11-21 13:25:18 [api_utils.py:347] version 0.32.0
(EngineCore pid=9933) INFO 11-21 13:25:36 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: \
model='m', speculative_config=None, tokenizer='m', trust_remote_code=False, dtype=torch.bfloat16, max_seq_len=4096, \
disable_custom_all_reduce=True, quantization=None, quantization_config=None, enforce_eager=True, \
kv_cache_dtype=auto, device_config=cpu, enable_prefix_caching=True, \
enable_chunked_prefill=True, compilation_config={'cudagraph_mode': <CUDAGraphMode.NONE: 0>}
(EngineCore pid=9933) INFO 11-21 13:25:58 [kv_cache_utils.py:2327] CPU KV cache size: 46,592 tokens, Maximum
WARNING 11-21 13:25:36 [vllm.py:725] Model Runner V2 requires Triton; using the V1 model runner instead.
""",
        {"version": "0.32.0", "kv_dtype": "auto", "kv_tokens": 46592},
        False,
        {"prefix caching": "True", "chunked prefill": "True", "CUDA graphs": "NONE", "speculative decoding": "None"}
        | {"model runner": "V1", "dtype": "bfloat16", "quantization": "None"},
    ),
    "vLLM, with a pool whose blocks its user set": Said(
        "vllm",
        """\
(EngineCore pid=9933) INFO 11-29 22:00:36 [kv_cache_utils.py:2619] Overriding num_gpu_blocks=1456 with \
num_gpu_blocks_override=72
(EngineCore pid=9933) INFO 11-29 22:00:36 [kv_cache_utils.py:2327] CPU KV cache size: 2,304 tokens, Maximum
""",
        {"kv_dtype": "auto", "kv_tokens": 2304, "kv_bytes": 1 << 30, "block_size": 32}
        | {"blocks_set": 72, "blocks_fit": 1456},
        False,
        {"prefix caching": "True"},
        {"/metrics": VLLM_PRESSED},
    ),
    "vLLM on GPUs, as users posted": Said(
        "vllm",
        """\
INFO 07-04 17:53:41 [fp8.py:296] Using MARLIN Fp8 MoE backend out of potential backends: ['AITER', 'MARLIN'].
INFO 07-04 17:53:41 [cuda.py:480] Using FLASHINFER attention backend out of potential backends: ['FLASHINFER'].
Using nvfp4_ds_mla data type to store kv cache.
INFO 09-10 13:29:25 [kv_cache_utils.py:864] GPU KV cache size: 652,144 tokens
""",
        {"kv_dtype": "nvfp4_ds_mla", "kv_tokens": 652144},
        True,
        {"attention backend": "FLASHINFER"},
    ),
}
COUNTED = {
    "llama-cpp": {"prefix_hits": 316, "drafted": 0, "accepted": 0},
    "sglang": {"preemptions": 3, "prefix_queries": 1200040, "prefix_hits": 1024},
    "lmdeploy": {"prefix_queries": 635, "prefix_hits": 316, "drafted": 0, "accepted": 0},
    "openvino": {},
    "vllm": {"preemptions": 0, "prefix_queries": 40, "prefix_hits": 0},
}

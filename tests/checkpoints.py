"""The golden model as checkpoints on disk, for the tests of hf and convert."""

import json
from pathlib import Path
from typing import Any

import golden
import numpy as np

CONFIG, _trunk, _mtp, _ = golden.load()
TRUNK = dict(_trunk)
MTP = dict(_mtp)
with np.load(golden.PATH) as _stored:
    TRANSFORMERS_JSON = json.loads(str(_stored["config"]))
    TRANSFORMERS = {
        name.removeprefix("weights/"): _stored[name]
        for name in _stored
        if name.startswith("weights/")
    }

# The official names of a layer, as in DeepSeek's index; a layer has some of them.
OFFICIAL = {
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.*.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.*.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.*.w3.weight": "ffn_up_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
OFFICIAL_TOP = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
OFFICIAL_MTP = {
    **{f"{n}.weight": f"{n}.weight" for n in "e_proj h_proj enorm hnorm norm".split()},
    **{f"hc_head_{n}": f"hc_head_{n}.weight" for n in ("fn", "base", "scale")},
}


def official() -> dict[str, np.ndarray]:
    """Return the golden weights as the official checkpoint names and cuts them."""
    names = dict(OFFICIAL_TOP)
    for layer in range(CONFIG.layers):
        names |= {
            f"layers.{layer}.{k}": f"blk.{layer}.{v}" for k, v in OFFICIAL.items()
        }
    names |= {f"mtp.0.{k}": f"mtp.0.{v}" for k, v in (OFFICIAL | OFFICIAL_MTP).items()}
    tensors = {}
    for name, gguf in names.items():
        values = (TRUNK | MTP).get(gguf)
        if values is None:
            continue
        if name.endswith("tid2eid"):
            values = values.astype(np.int64)
        if "*" in name:
            for expert in range(CONFIG.experts):
                tensors[name.replace("*", str(expert))] = values[expert]
        else:
            tensors[name] = values
    return tensors


DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "int8": "I8", "uint8": "U8", "int32": "I32",
    "int64": "I64",
}  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray]):
    """Write a safetensors file; the library cannot write FP8 from numpy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        start, data = len(data), data + values.tobytes()
        header[name] = {
            "dtype": DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


OFFICIAL_WEIGHTS = official()

"""DeepSeek-V4-Flash's speculative decoding in JAX, bit-exact and from GGUF.

Axis letters, used by every shape in this package (docstrings, jaxtyping, einsum):

    B  sequences in a batch          T  rows (new tokens) of one pass
    S  cached rows a query may see   P  slots of a ring
    W  rows of a verification pass   C  compressed rows
    D  hidden width                  M  hyper-connection streams
    H  attention heads               K  head width (keys = values)
    G  output groups                 Q  q-LoRA rank
    I  indexer heads                 J  indexer head width
    E  routed experts                U  experts used per token
    F  expert FFN width              V  vocabulary
    L  layers                        R  rotary channels (the last R of a head)

Lower-case letters in einsum strings are the same axes.  `t` is an absolute token
position counted from 0; `length` is the number of committed tokens.
"""

__version__ = "0.1.0"

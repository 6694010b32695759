"""The one door to attention: every network of the house calls `attention`, so a faster kernel is a change of this file.

Letters: B batch, N heads, L query tokens, M key tokens, D head size.
"""

from torch import Tensor
from torch.nn import functional as F


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full (unmasked) softmax attention at scale 1/sqrt(D).

    Query [B,N,L,D], key and value [B,N,M,D] -> [B,N,L,D]. Torch picks the fused kernel that the device, dtype and shape
    allow; all of them agree with the plain softmax up to rounding.
    """
    return F.scaled_dot_product_attention(query, key, value)

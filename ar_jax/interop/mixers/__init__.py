"""Official runs of mixers, by the class that made them: which function replays them. Found when they are asked for."""

from __future__ import annotations

from ar_jax.interop import lazily
from ar_jax.interop.kinds import Replay

REPLAYS: dict[str, Replay] = {
    "natten": Replay(r"SHI-Labs/NATTEN;.*flex_fna_generic", lazily("mixers.grids:replay_natten")),
    "natten_module": Replay(
        r"SHI-Labs/NATTEN;.*natten\.NeighborhoodAttention", lazily("mixers.grids:replay_natten_module")
    ),
    "axial_attention": Replay(
        r"axial-attention;.*axial_attention\.AxialAttention", lazily("mixers.grids:replay_axial")
    ),
    "axial_image_transformer": Replay(
        r"axial-attention;.*axial_attention\.AxialImageTransformer", lazily("mixers.grids:replay_axial_image")
    ),
    "halo_attention": Replay(r"lucidrains/halonet-pytorch;", lazily("mixers.vision:replay_halo")),
    "halo_attention_timm": Replay(r"halo_attn\.HaloAttn", lazily("mixers.vision:replay_halo_timm")),
    "van_block": Replay(r"Visual-Attention-Network/VAN.*van\.Block", lazily("mixers.vision:replay_van_block")),
    "van_model": Replay(r"Visual-Attention-Network/VAN.*van\.VAN", lazily("mixers.vision:replay_van_model")),
    "mambaout_block": Replay(r"yuweihao/MambaOut;.*GatedCNNBlock", lazily("mixers.vision:replay_mambaout_block")),
    "mambaout_model": Replay(r"yuweihao/MambaOut;.*mambaout\.MambaOut", lazily("mixers.vision:replay_mambaout_model")),
    "lightnet": Replay(r"layers\.lightnet\.LightNetAttention", lazily("mixers.lightnet:replay")),
    "ulsam": Replay(r"Nandan91/ULSAM;", lazily("mixers.vision:replay_ulsam")),
    "lightweight_conv": Replay(
        r"facebookresearch/fairseq;.*LightweightConv1dTBC", lazily("mixers.convolutions:replay_lightweight")
    ),
    "dynamic_conv": Replay(
        r"facebookresearch/fairseq;.*DynamicConv1dTBC", lazily("mixers.convolutions:replay_dynamic")
    ),
    "fnet": Replay(r"jaketae/fnet;.*FNetEncoderLayer", lazily("mixers.fourier:replay_fnet")),
    "linformer_attention": Replay(
        r"lucidrains/linformer;.*LinformerSelfAttention", lazily("mixers.linformer:replay_attention")
    ),
    "linformer_lm": Replay(r"lucidrains/linformer;.*LinformerLM", lazily("mixers.linformer:replay_lm")),
    "hrrformer_attention": Replay(r"/Hrrformer,.*SelfAttention", lazily("mixers.hrrformer:replay_attention")),
    "hrrformer_classifier": Replay(r"/Hrrformer,.*Network", lazily("mixers.hrrformer:replay_classifier")),
    "fla_forgetting_attn": Replay(
        r"fla-org/flash-linear-attention;.*naive_forgetting_attn", lazily("mixers.sparse:replay_forgetting")
    ),
    "tree_attention_decode": Replay(r"Zyphra/tree_attention;.*tree_decode", lazily("mixers.sparse:replay_tree")),
    "aft": Replay(r"rish-16/aft-pytorch", lazily("mixers.aft:replay")),
    "fla_nsa": Replay(r"fla-org/flash-linear-attention;.*naive_nsa", lazily("mixers.sparse:replay_native_sparse")),
    "sparsek_operator": Replay(r"definition: argmin .*0<=p<=1, sum p = k", lazily("mixers.sparse:replay_sparsek")),
    "mega": Replay(r"facebookresearch/mega;.*MovingAverageGatedAttention", lazily("mixers.moving_average:replay")),
    "mra_attention": Replay(r"mlpen/mra-attention;.*mra2_attention", lazily("mixers.sparse:replay_multiresolution")),
    "loki": Replay(r"hpcgroup/loki;.*mask_attn_pca_topk", lazily("mixers.sparse:replay_loki")),
    "gss_layer": Replay(r"gated-state-spaces-pytorch;.*gss\.GSS\b", lazily("mixers.state_spaces:replay_layer")),
    "gss_lm": Replay(r"gated-state-spaces-pytorch;.*GatedStateSpacesLM", lazily("mixers.state_spaces:replay_lm")),
    "routing_kmeans_attention": Replay(
        r"lucidrains/routing-transformer;.*KmeansAttention", lazily("mixers.routing:replay_routing")
    ),
    "seerattention_gate": Replay(
        r"microsoft/SeerAttention;.*prefill_sparse\.attn_gate\.AttnGate", lazily("mixers.seer:replay_prefill_gate")
    ),
    "seerattention_r_decode_gate": Replay(
        r"microsoft/SeerAttention;.*decode_sparse\.attn_gate_inf\.AttnGate", lazily("mixers.seer:replay_decode_gate")
    ),
}

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
    "mamba_block": Replay(r"state-spaces/mamba;.*mamba_simple\.Mamba\b", lazily("mixers.mamba:replay_mamba")),
    "mamba2_block": Replay(r"state-spaces/mamba;.*mamba2\.Mamba2\b", lazily("mixers.mamba:replay_mamba2")),
    "mamba_selective_scan": Replay(
        r"state-spaces/mamba;.*selective_scan_(ref|fn)\b", lazily("mixers.mamba:replay_scan")
    ),
    "mamba2_ssd_minimal": Replay(r"state-spaces/mamba;.*ssd_minimal_discrete", lazily("mixers.mamba:replay_duality")),
    "fla_delta_rule": Replay(r"flash-linear-attention;.*fla\.ops\.delta_rule\.", lazily("mixers.delta:replay_delta")),
    "fla_gated_delta_rule": Replay(
        r"flash-linear-attention;.*fla\.ops\.gated_delta_rule\.", lazily("mixers.delta:replay_gated_delta")
    ),
    "fla_gated_delta_product": Replay(
        r"flash-linear-attention;.*fla\.ops\.gated_delta_product\.", lazily("mixers.delta:replay_delta_product")
    ),
    "fla_rwkv6": Replay(r"flash-linear-attention;.*fla\.ops\.rwkv6\.", lazily("mixers.delta:replay_rwkv6")),
    "fla_rwkv7": Replay(
        r"flash-linear-attention;.*fla\.ops\.(rwkv7|generalized_delta_rule\.dplr)\b",
        lazily("mixers.delta:replay_rwkv7"),
    ),
    "perceiver_ar_official": Replay(
        r"google-research/perceiver-ar;.*PerceiverAR", lazily("mixers.perceiver_ar:replay_official")
    ),
    "perceiver_ar_lucidrains": Replay(
        r"lucidrains/perceiver-ar-pytorch;", lazily("mixers.perceiver_ar:replay_community")
    ),
    "block_transformer": Replay(r"itsnamgyu/block-transformer;", lazily("mixers.block_transformer:replay")),
    "linear_transformer_attention": Replay(
        r"idiap/fast-transformers;.*attention_layer\.AttentionLayer", lazily("mixers.linear:replay_layer")
    ),
    "linear_transformer_encoder": Replay(
        r"idiap/fast-transformers;.*EncoderBuilder", lazily("mixers.linear:replay_encoder")
    ),
    "fla_linear_attn": Replay(
        r"flash-linear-attention;.*; fla\.ops\.linear_attn\.", lazily("mixers.linear:replay_linear")
    ),
    "fla_gla": Replay(r"flash-linear-attention;.*; fla\.ops\.(simple_)?gla\.", lazily("mixers.linear:replay_gated")),
    "fla_lightning_attn": Replay(
        r"flash-linear-attention;.*; fla\.ops\.lightning_attn\.", lazily("mixers.linear:replay_lightning")
    ),
    "fla_retention": Replay(
        r"flash-linear-attention;.*; fla\.ops\.retention\.", lazily("mixers.linear:replay_retention")
    ),
    "fla_based": Replay(r"flash-linear-attention;.*; fla\.ops\.(re)?based\.", lazily("mixers.linear:replay_based")),
    "fla_hgrn": Replay(r"flash-linear-attention;.*; fla\.ops\.hgrn\.", lazily("mixers.linear:replay_hgrn")),
    "fla_mesa_net": Replay(
        r"flash-linear-attention;.*fla\.ops\.mesa_net\.", lazily("mixers.fitted_memories:replay_mesa")
    ),
    "fla_slots": Replay(r"flash-linear-attention;.*; fla\.ops\.(gsa|abc)\.", lazily("mixers.slots:replay")),
    "agalite_attention": Replay(r"subho406/agalite;.*AttentionORLiTLayer", lazily("mixers.agalite:replay_attention")),
    "agalite": Replay(r"subho406/agalite;.*agalite\.AGaLiTe", lazily("mixers.agalite:replay_network")),
    "fla_ttt_linear": Replay(r"flash-linear-attention;.*fla\.ops\.ttt\.", lazily("mixers.fitted_memories:replay_ttt")),
    "fla_log_linear_attn": Replay(
        r"flash-linear-attention;.*fla\.ops\.log_linear_attn\.", lazily("mixers.fitted_memories:replay_log_linear")
    ),
}

"""One row per published size: what the official code allocates, and what its authors say."""

from __future__ import annotations

from typing import Any

from ar_jax.data.protocol import Facts

NULL_CAPTION = 120 * 2048  # LlamaGen draws the caption that means "none" at random and keeps it; here it is learned
SPARE_ROWS = 1022 + 1024 + 98 + 1  # RAR: places and steps behind the image's end, in three tables, and a mask's code
SPARE_CODE = 1  # ARPG: a row of the table of codes that nothing means
SPARE_PLACE = 1  # AiM: a place behind the image's end
SECOND_SENTENCE = 1  # TiTok's BERT: the type of a second sentence

# Config and variant; trainable parameters of the official module; how many more ours has (less, where some of theirs carry
# nothing); what its authors say of the size in a table, "" where they do not.
SIZES = [
    ("llamagen:b_256", 110_888_448, 0, "111M"),
    ("llamagen:l_256", 342_910_976, 0, "343M"),
    ("llamagen:xl_256", 774_699_520, 0, "775M"),
    ("llamagen:xxl_256", 1_410_972_672, 0, "1.4B"),
    ("llamagen:3b_256", 3_096_659_200, 0, "3.1B"),
    ("llamagen:b_384", 110_888_448, 0, "111M"),
    ("llamagen:l_384", 342_910_976, 0, "343M"),
    ("llamagen:xl_384", 774_699_520, 0, "775M"),
    ("llamagen:xxl_384", 1_410_972_672, 0, "1.4B"),
    ("llamagen:3b_384", 3_096_659_200, 0, "3.1B"),
    ("llamagen:t2i_b", 112_282_368, NULL_CAPTION, ""),
    ("llamagen:t2i_l", 345_031_680, NULL_CAPTION, ""),
    ("llamagen:t2i_xl", 777_678_080, NULL_CAPTION, ""),  # they say 775M, which is the class-conditional one's
    ("llamagen:t2i_xxl", 1_414_940_160, NULL_CAPTION, ""),
    ("llamagen:t2i_3b", 3_110_249_600, NULL_CAPTION, ""),
    ("llamagen:t2i_xl_512", 777_678_080, NULL_CAPTION, ""),
    ("var:d16", 310_283_520, 0, "310M"),
    ("var:d20", 600_917_136, 0, "600M"),
    ("var:d24", 1_033_399_360, 0, "1.0B"),
    ("var:d30", 2_010_020_356, 0, "2.0B"),
    ("var:d36_512", 2_353_893_904, 0, "2.3B"),
    ("mvar:d12", 198_435_424, 0, "198M"),
    ("mvar:d16", 464_157_184, 0, "464M"),
    ("mvar:d20", 900_528_736, 0, "900M"),
    ("mvar:d24", 1_550_067_136, 0, "1.5B"),
    ("mvar:d32", 3_658_707_968, 0, ""),
    ("mar:b", 207_924_768, 0, "208M"),
    ("mar:l", 478_326_304, 0, "479M"),
    ("mar:h", 942_403_104, 0, "943M"),
    ("rar:b", 260_923_648, -SPARE_ROWS * 768, "261M"),
    ("rar:l", 461_668_352, -SPARE_ROWS * 1024, "461M"),
    ("rar:xl", 955_425_024, -SPARE_ROWS * 1280, "955M"),
    ("rar:xxl", 1_498_520_704, -SPARE_ROWS * 1408, "1.5B"),
    ("arpg:l", 319_845_376, -SPARE_CODE * 1024, "320M"),
    ("arpg:xl", 718_997_760, -SPARE_CODE * 1280, "719M"),
    ("arpg:xxl", 1_302_449_664, -SPARE_CODE * 1536, "1.3B"),
    ("aim:b", 147_622_080, -SPARE_PLACE * 768, "148M"),
    ("aim:l", 349_760_000, -SPARE_PLACE * 1024, "350M"),
    ("aim:xl", 763_291_392, -SPARE_PLACE * 1536, "763M"),
    ("aim:1b", 1_335_944_192, -SPARE_PLACE * 2048, "1.3B"),
    ("maskgit:titok_l_32", 177_202_432, -SECOND_SENTENCE * 768, "177M"),
    ("maskgit:titok_b_64", 177_227_008, -SECOND_SENTENCE * 768, "177M"),
    ("maskgit:titok_s_128", 294_990_848, 0, ""),
    ("nar:b", 130_551_552, 0, ""),
    ("nar:m", 295_453_696, 0, ""),
    ("nar:l", 372_536_320, 0, ""),
    ("nar:xl", 815_991_040, 0, "816M"),
    ("nar:xxl", 1_464_454_656, 0, ""),
    ("nar:t2i_xl", 818_969_600, NULL_CAPTION, ""),  # they say 816M, which is the class-conditional one's
    ("dnd_transformer:xxl", 1_436_140_032, 0, "1.4B"),
    ("dnd_transformer:xxxl", 2_569_164_800, 0, "2.5B"),
    ("dnd_transformer:arxiv_xxl", 1_585_608_192, 0, ""),
    ("dnd_transformer:text_xxl", 1_371_687_936, 0, ""),
    ("par:l_4x", 342_914_048, 0, "343M"),
    ("par:xl_4x", 774_703_360, 0, "775M"),
    ("par:xxl_4x", 1_410_977_280, 0, "1.4B"),
    ("par:3b_4x", 3_096_668_800, 0, "3.1B"),
    ("par:3b_16x", 3_096_707_200, 0, "3.1B"),
    ("lpd:l", 337_157_120, 0, "337M"),
    ("lpd:xl", 751_947_520, 0, "752M"),
    ("lpd:xxl", 1_412_184_576, 0, "1.4B"),
    ("lpd:l_512", 337_943_552, 0, "337M"),
    ("lpd:xl_512", 752_930_560, 0, "752M"),
    ("npp:b", 110_888_448, 0, "111M"),
    ("npp:l", 342_910_976, 0, "343M"),
    ("npp:xl", 774_699_520, 0, "775M"),
    ("npp:xxl", 1_410_972_672, 0, "1.4B"),
    ("maskgil:b", 110_889_984, 0, "111M"),
    ("maskgil:l", 342_913_024, 0, ""),
    ("maskgil:xl", 774_702_080, 0, ""),
    ("maskgil:xxl", 1_410_975_744, 0, "1.4B"),
]
NAMES = [row[0] for row in SIZES]
# Parameters of the official tokenizers, by config.
TOKENIZERS = {
    "llamagen": 71_883_403,
    "nar": 71_883_403,
    "par": 71_883_403,
    "maskgil": 71_883_403,
    "npp": 71_883_403,
    "lpd": 71_883_403,
    "arpg": 71_883_403,
    "aim": 71_883_403,
    "var": 108_948_355,
    "mvar": 108_948_355,
    "mar": 66_456_019,
    "rar": 54_515_587,
}


def facts_of(config: Any) -> Facts:
    """What ImageNet is, at a config's size."""
    size = config.data.image_size
    return Facts("image", (size, size, 3), 256, tuple(map(str, range(1000))))

"""Aspect tables: the sizes in which each resolution of Open-Sora trains, as published.

1.1 to 1.3 list sizes by hand (od/aspect.py, 1.2): seventeen ratios for each `<N>p`, and PixArt's forty for the square
resolutions. 2.0 computes them (od/aspect.py, main). Aspects are named W:H throughout; 1.x names the same ratios H:W.
Sizes are "HxW" in pixels.
"""

# Open-Sora 2.0 names its aspect ratios W:H; the inverse of each is a bucket too.
ASPECT_RATIOS: dict[str, float] = {
    "2.39:1": 2.39,
    "2:1": 2.0,
    "16:9": 16 / 9,
    "1.85:1": 1.85,
    "3:2": 1.5,
    "8:5": 1.6,
    "4:3": 4 / 3,
    "1:1": 1.0,
    "3:4": 3 / 4,
    "5:8": 5 / 8,
    "2:3": 2 / 3,
    "9:16": 9 / 16,
    "1:1.85": 1 / 1.85,
    "1:2": 0.5,
    "1:2.39": 1 / 2.39,
}

# Names of the seventeen ratios of 1.x, widest first, in the order of the tables below.
P_NAMES = (
    *("8:3", "21:9", "25:12", "2:1", "17:9", "50:27", "16:9", "8:5", "3:2", "4:3"),
    *("1:1", "3:4", "2:3", "9:16", "9:17", "1:2", "27:50"),
)

# Width / height of every name of any generation.
RATIOS: dict[str, float] = {
    **{name: int(name.split(":")[0]) / int(name.split(":")[1]) for name in P_NAMES},
    **ASPECT_RATIOS,
}

P_TABLES: dict[str, str] = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 "
    "256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 "
    "426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 "
    "640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 "
    "854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
    "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
    "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
    "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
    "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}

# PixArt's table at 1024; 256, 512 and 2048 are it divided by 4, by 2, and doubled.
PIXART_1024 = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024"
)
# The one wide size of that table whose mirror image is not in it.
WITHOUT_MIRROR = (704, 1344)
SQUARES = {"256": 0.25, "512": 0.5, "1024": 1.0, "2048": 2.0}

# Pixels per frame that each name stands for (od/bucket.py).
NOMINAL_AREAS: dict[str, int] = {
    "144p": 36864,
    "256": 65536,
    "240p": 102240,
    "360p": 230400,
    "512": 262144,
    "480p": 409920,
    "720p": 921600,
    "1024": 1048576,
    "1080p": 2073600,
    "2k": 3686400,
    "2048": 4194304,
    "4k": 8294400,
}


def table(resolution: str) -> dict[str, tuple[int, int]]:
    """Sizes (H, W) of a listed resolution by aspect name (W:H, or WxH for PixArt's); KeyError for another name."""
    if resolution in P_TABLES:
        return dict(zip(P_NAMES, map(_size, P_TABLES[resolution].split()), strict=True))
    factor = SQUARES[resolution]
    wide = [_size(text) for text in PIXART_1024.split()]
    tall = [(w, h) for h, w in reversed(wide[:-1]) if (h, w) != WITHOUT_MIRROR]
    scaled = [(int(h * factor), int(w * factor)) for h, w in (*wide, *tall)]
    return {"1:1" if h == w else f"{w}:{h}": (h, w) for h, w in scaled}


def _size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)

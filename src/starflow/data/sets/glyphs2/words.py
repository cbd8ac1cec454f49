"""Names of things, from the names that icon sets and clip art give their files; and what is left out by its name.

Contract: pure functions of text, the same on every machine. `corrections.json` holds what was put right by looking
at the pictures: for a source, or a family of sources, the name that the rules give, and the better one; null leaves
the picture out.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from itertools import pairwise

from starflow.data.sets.glyphs.captions import COLOUR_WORDS

# A picture is left out if one of these is a word of its name. Text and signs:
_TEXT = """
    alphabet alphabetical alphabets alphanum ampersand aquarius aries asterisk asterix barcode braces bracket
    brackets cancer capricorn caps captions celsius character chinese clef copyleft copyright decimal digit division
    ecg eeg english equal equation factorial fahrenheit font gemini glyph hashtag heading hieroglyph hieroglyphics
    kanji keycap label labels lambda leo letter letters libra logo markdown math mathematic minus monogram multiply
    nmr number numbers numeral numerical omega ophiuchus paragraph percent percentage percentages pi pisces plus qr
    qrcode question quotation registered roman rune saggitarius sagittarius scorpio scorpius script sigma spelling
    subtitles tarot taurus text trademark type typing typography vip virgo yang yin zodiac
"""
# Interfaces, files, charts, arrows, abstract shapes:
_INTERFACE = """
    3g 4g 5g abnormal abort accelerator accept account actions activation add address adjust adjustment agents ai
    aiming alert algorithm align alignment alignright all allapplication analysis analytics android-setting
    antivirus api app application application-effect applications approval approve approved apps arithmetic arrange
    arrow arrows ascending assembly at attach attachment attention attribution authentication auto auto-flash
    automatic avoidance awareness axis back background backup backward badge-check bar bars bearish bezier block
    block-bell blockchain bluetooth bold border braille branch branches branching broadcast browser bubble bug-virus
    bullet bullish button buttons byte cancel cell-border cellular change chart charts chat check checkbox checked
    checking checklist checkmark choose circle clear click close closed-captioning cloud-download cloud-upload code
    coding cog-search collapse column columns combo comma command comment comments communication component
    composition compress compression config configuration confirmed connect connection connection-box connector
    consume contact contacts content control controls converge conversation convert copy corner crop crosshair css
    cursor cut cycle dash dashboard dashed data database decrease default delect delete deny deployment descending
    design detail detection develop diagram dial dial-pad direction directions disable disabled disapprove
    disc-error dislike display distraction distribute divergence divert divide division-circle doc docs document
    documents domain dot dots double-click double-tap downgrade download downloads drafts drag dropdown duality
    duplicate duration ebook-reader edit editing editor eject email emails encryption end enter equalizer error
    evasion exchange exclamation exclude exit expand expander expense expired export external face-id faceid
    facescan fail failed faq fast fast-forward fastforward feed feedback file files fill filter filters find
    fingerprint fit flash-auto flash-off flash-on flip flow flowchart focus folder folders forbid forbidden form
    format forward frame-x front-camera full-screen fullscreen function functions funds gear-setting gesture gif
    graph graphic graphs grid group-by guide guides hand-held-tablet hashtag-key hd hdr heat-map help heptagram
    hexagon hexagram hide hierarchical hierarchy histogram history horizontal html html5 icon id identifier image
    images import imports inbox incognito increase indent index infinity info information input insert instruction
    interface internet interrupt intersect invalid invisible invite invoice ios iris-scan italic join jump justify
    key-asterisk keyboard-asterisk keyhole-lock landscape-setting lasso layer layers layout layouts left-right level
    levels like line-chart lines link linked links list lists live-video load loading location log login logout loop
    lte macro-mode mail-incoming mail-outgoing malware markup mask-layer maximize menu merge message messages mind
    mindmap minimize misdirection mms mode modem-error module module-four module-three modules monitor-bug more move
    msdos multi multiple-selection mute navigation navigation-menu network networks new next nfc no node nodes none
    notification notifications object octagon octagram off ok-button on one-finger online open-an operating optimize
    option optional options org organigram organization orientation outbox outdent outgoing outline output oval
    overdrive overhead overkill overlap page pages paginate panel parallel parallelogram password paste path
    pathfinder pause pentagon permissions pixel play play-list playback playlist pointer polygon position post power
    power-button preview previous print-preview privacy process process-chart processes profile program programming
    progress progression prohibited protection protocol pull push quadrilateral query queue quick quick-access quit
    radar-plot radio-button ram-chip rank ranking rating ratings recent recipient record recording recover recovery
    rectangle rectangles redo reduce reflect refresh reload remind reminder removal remove repeat replace replay
    reply report request reset resize resolution respond responsive restore result resume return reverse revert
    review rewind right-angle rotate rotation round-cap row rows rss ruler-mode rules safe-retrieval sale save
    scale-horizontal scale-vertical scan scan-code scanning scatter schedule screen-share script-file
    scroll-vertical search searching section segment select selection send sent seo serial server servers service
    set setting settings shape shapes share shared shift shipment shortcut show shrink shuffle sidebar sign-in
    sign-out signal signals signature sim sinagot sites size skip slide slider sliders sms sort sorting spam split
    square square-root squares start static statistic statistics status step steps stock-market stop stop-button
    stream strikethrough style subtract success support survey swap swipe switch-account symbol symbols sync
    synchronize system tab table-column tabs tag-add tap target-arrows target-shot task tasks template test threat
    threats time-lapse timeline todo toggle toggles tooltip top-left topic touch touch-id touchscreen track tracking
    transaction transfer transform transition translate transparent trapezium trapezoid trash-restore trending
    trends triangle triangles trigger trim tune two-finger unbalanced uncertainty underline undo union unlike unlock
    unlocking unread untitled update upgrade upload url usable user users validate validation validity value
    variables vector verified vertical vibrate view views visible visual voice voicemail volume vote vpn warning
    warp web website websites whole-site widget widgets wifi window-layout word workflow wrap zoom
"""
# Money, currencies, payment:
_MONEY = """
    atm bag-dollar bank-card banknote-yen billet binance bitcoin cash cashflow cashless coins-exchange coupon
    coupons credit crypto currency debit debt deposit discount dollar dollars ethereum euro euros expenses finance
    financial financing income investing investment ipo litecoin mastercard monero namecoin pay payment payments
    paypal pound pounds price pricing profit receipt receipts refund ripple rupee rupees sales stocks subscription
    tax trade trading transactions visa won xrp yen yuan
"""
# Brands, products, people, characters:
_BRANDS = """
    adidas adobe airbnb airdrop airplay airpods alipay amazon android app-store apple-1 apple-store asterix audi
    baidu batman bbc bing blackberry bmw bullet-bill bush-president bytedance calvin captain captain-shield chaplin
    charlie che chevrolet chrome coca codepen cola companion-cube conway coreos cpu-shot darth death-star deathcab
    debian deku diablo dig-dug dingtalk discord disney douyin dreamworks dribbble dropbox ebay einstein elsa eminem
    epic-games evernote excel facebook feishu figma firefox flickr ford freebsd freemasonry gameboy gamecube github
    gitlab gmail gnome gnu google gopro gucci guevara guinness harry-potter hobbit honda hp huawei hulk hummer
    hummers hylian i-mac ibm icons8 imac instagram intel intellij ipad iphone ipod itunes iwatch jabber james-bond
    jason java javascript jedi jobs joomla joypixels kamehameha kde kindle kirby klingon lego lenin lewis-chess
    lincoln linkedin linux lisa mac macintosh mandela mario master-sword mastodon maya mcdonalds megaman mercedes
    messenger meta metroid mickey microsoft minecraft minion minions mitsubishi monument-valley mozilla mustang
    napoleon naruto netflix nike nintendo nook norris obama obelix openclipart openoffice opera oracle pacman
    papa-smurf paypal pepsi peugeot picasso pinterest play-station playstation playstation4 pokeball pokecog pokemon
    porsche potter powerpoint ppt predator ps ps4 ps5 python quake quidditch r2 r2d2 reddit redhat renault robocop
    rubik safari saiyan samus schrodingers scooby sheikah shrek sidonie simpson simpsons skype slack smurf snapchat
    snitch snoopy sonic soundcloud spider-man spiderman spock spock-hand spongebob spotify stahlhelm star-wars
    starwars steam-logo steve-jobs stumbleupon super-mushroom superman suse switch-nintendo taylor telegram
    terminator tesla-motors tetris thwomp tianmao tiktok tinder tintin toyota triforce tron tux twitter ubisoft
    ubuntu unity van-damme vespa viacoin vlc volkswagen vw wall-e walle washington wechat weibo weixin whatsapp wii
    wikipedia windows xbox xiaodu yahoo yamaha yoda youtube zelda zeus-sword
"""
# What nobody should be shown unasked, and flags of states:
_UNWANTED = """
    amputation ass balkenkreuz bdsm bleeding bondage breast-pump cannabis cigarette decapitated decapitation drugs
    drunk execution flag-of flags genocide gibbet guillotine hammer-sickle  hitler lynch mao marijuana morgue
    murder naked nazi nude overdose pantyhose penis porn rape sex sexy slavery smoke-free smoking sperm stahlhelm
    stalin stigmata suicide swastika terror terrorist tit tits torture vagina vulva weed whip-slave
"""

# The few signs and interface words that leave a picture out of every set:
_SIGNS = """
    anticlockwise-rotation arrow arrows button buttons chart check-mark checkbox checkmark clockwise-rotation
    crosshair cursor diagram divergence download file files hamburger-menu histogram horizontal-flip misdirection
    organigram pie-chart plain-circle plain-square rank triangle-target unlike upload vertical-flip
"""

DROPPED = frozenset(" ".join((_TEXT, _SIGNS, _MONEY, _BRANDS, _UNWANTED)).split())
DROPPED_FROM_INTERFACES = DROPPED | frozenset(_INTERFACE.split())

_NUMBER_WORDS = frozenset("one two three four five six seven eight nine ten".split())

# Colours and sizes do not make another concept: whoever holds out "red apple" holds out "green apple".
_NOT_THE_CONCEPT = COLOUR_WORDS | frozenset(
    "light dark small little large big a an the of with and in on at for to plain simple medium old new".split()
)
_PLURALS = {"leaves": "leaf", "knives": "knife", "wolves": "wolf", "mice": "mouse", "feet": "foot", "teeth": "tooth"}
_KEPT_S = frozenset(
    "bus cactus chess gas glass glasses grass jeans lens octopus pants scissors shorts trousers".split()
)
# Words for the same thing in the sources.
_SYNONYMS = {
    "automobile": "car",
    "aeroplane": "airplane",
    "aubergine": "eggplant",
    "bike": "bicycle",
    "couch": "sofa",
    "donut": "doughnut",
    "fridge": "refrigerator",
    "icecream": "ice cream",
    "lorry": "truck",
    "motorbike": "motorcycle",
    "notebook-computer": "laptop",
    "present": "gift",
    "puppy": "dog",
    "rubbish": "trash",
    "specs": "glasses",
    "tv": "television",
    "burger": "hamburger",
    "picture": "painting",
}


def words_of(name: str) -> list[str]:
    """The words of a file's or an icon's name, in lower case; hyphens and underscores part them."""
    return [word for word in re.split(r"[^a-z0-9']+", name.lower().replace("\u2019", "'")) if word]


def dropped_word(name: str, dropped: frozenset[str] = DROPPED) -> str | None:
    """The first word, or pair of words, because of which a picture of this name is left out, or None.

    >>> dropped_word("cart-add", DROPPED_FROM_INTERFACES), dropped_word("spider-man"), dropped_word("cut-lemon")
    ('add', 'spider-man', None)
    """
    words = words_of(name)
    pairs = [f"{first}-{second}" for first, second in pairwise(words)]
    return next((word for word in [*words, *pairs] if word in dropped), None)


def plain_name(slug: str) -> str:
    """A slug as words, without the number that tells variants apart.

    >>> plain_name("coffee-cup-hot-2"), plain_name("apple-one"), plain_name("chess-king")
    ('coffee cup hot', 'apple', 'chess king')
    """
    words = words_of(slug)
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _NUMBER_WORDS or words[-1] in ("alt", "alternate")):
        words.pop()
    return " ".join(words)


def corrected(name: str, *sources: str) -> str | None:
    """The name as corrected for one of these sources, the first that has it; None if the picture is left out.

    >>> corrected("fork knife", "streamline"), corrected("red apple", "streamline"), corrected("alt", "streamline")
    ('fork and knife', 'red apple', None)
    """
    for source in sources:
        if name in _corrections().get(source, {}):
            return _corrections()[source][name]
    if name.startswith("smiley ") and "face" not in name:
        return f"{name.removeprefix('smiley ')} smiley face"
    return name


@cache
def _corrections() -> dict[str, dict[str, str | None]]:
    text = resources.files(__package__).joinpath("corrections.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, str | None]] = json.loads(text)
    return found


def concept_key(name: str) -> str:
    """What joins the same thing over all sources: its words, singular, sorted, without colours and sizes.

    >>> concept_key("red apple") == concept_key("green apples") == "apple"
    True
    >>> concept_key("couch and lamp")
    'lamp sofa'
    """
    words = [_SYNONYMS.get(word, word) for word in map(_singular, words_of(name))]
    kept = sorted({part for word in words for part in word.split()} - _NOT_THE_CONCEPT)
    return " ".join(kept or sorted(words))


def _singular(word: str) -> str:
    word = word.removesuffix("'s").removesuffix("'")
    if word in _PLURALS:
        return _PLURALS[word]
    if len(word) < 4 or word in _KEPT_S or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1]

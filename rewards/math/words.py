# ruff: noqa: RUF001
"""Words beside a number: those that name what is counted, and those that make it another number.

Nothing here is a dictionary. A word that is no unit, no plural and no known noun is not taken for what is counted.
"""

from __future__ import annotations

import re

# Words beside an answer that make it another number, or one of several, or no answer.
_NOT_BESIDE = """
or and either neither nor not no never none else otherwise maybe perhaps possibly probably alternatively but if then
unless except without negative negatives minus plus times twice thrice double doubles triple triples quadruple about
around approximately approx roughly nearly circa almost barely ish less lesser more fewer greater smaller larger
bigger higher lower than below above under over off short most least up down percent percents percentage percentages
permille base mod modulo modulus remainder factorial factorials choose power powers exponent root roots inverse
inverses reciprocal reciprocals opposite opposites complement complements conjugate log logs logarithm logarithms half
halves halfs third thirds quarter quarters pair pairs couple couples score scores gross grosses dozen dozens ten tens
hundred hundreds thousand thousands zillion zillions myriad myriads lakh lakhs lac lacs crore crores googol googols
mille mil mils mio bn basis kilo mega giga zero zeros zeroes one ones two twos three threes four fours five fives six
sixes seven sevens eight eights nine nines eleven twelve twenty thirty forty fifty sixty seventy eighty ninety teen
teens is isn isnt was are be been am equals equal wrong incorrect false impossible invalid instead rather versus vs to
into from by so because since therefore thus hence upward upwards onward onwards downwards thereabouts always
sometimes besides towards does has sines cosines tangents
"""
NOT_BESIDE = frozenset(_NOT_BESIDE.split())

# Names of one unit, the first of which is used. A plural "s" is understood.
_SYNONYMS = """
nm nanometer nanometre|um micrometer micrometre micron|mm millimeter millimetre|cm centimeter centimetre|
dm decimeter decimetre|m meter metre|km kilometer kilometre|in inch inches|ft foot feet|yd yard|mi mile|
mcg ug microgram|mg milligram|g gram gm|kg kilogram kilo|t ton tonne|lb lbs|pound|oz ounce|
ml milliliter millilitre mL|cl centiliter centilitre cL|dl deciliter decilitre dL|l liter litre L|
gal gallon|qt quart|pt pint|cup|tbsp tablespoon|tsp teaspoon|acre|ha hectare|
us microsecond|ms millisecond|s sec second|min minute|h hr hour|day|week wk|month|yr year|decade|century centuries|
mi/h mph|km/h kmh kph|rpm|knot|Hz hertz|kHz kilohertz|MHz megahertz|GHz gigahertz|
N newton|kN kilonewton|J joule|kJ kilojoule|MJ megajoule|cal calorie|kcal kilocalorie|eV|keV|MeV|GeV|
W watt|kW kilowatt|MW megawatt|kWh|V volt|kV kilovolt|mV millivolt|A ampere amp|mA milliampere|ohm|K kelvin|
Pa pascal|kPa kilopascal|MPa megapascal|bar|atm atmosphere|mol mole|mmol|T tesla|
bit|byte|KB kilobyte|MB megabyte|GB gigabyte|TB terabyte|
$ dollar USD buck US$|cent|penny pennies pence|euro EUR €|£ GBP|rupee Rs INR ₹|yen JPY ¥|yuan RMB CNY|won KRW ₩|
ruble rouble RUB ₽|peso|franc CHF|rad radian|unit|C Celsius celsius|F Fahrenheit fahrenheit
"""
UNITS = {
    spelling: names.split()[0]
    for names in _SYNONYMS.replace("\n", "").split("|")
    for name in names.split()
    for spelling in (name, name + "s")
}
ATTACHED = "mm|cm|dm|km|nm|kg|mg|mL|ml|ft|lbs?|oz|mph|min|hrs?|yd|m/s|km/h|kW|kWh|Hz|kHz|MHz"  # "42cm" without a blank
CURRENCIES = frozenset(["$", "cent", "penny", "euro", "£", "rupee", "yen", "yuan", "won", "ruble", "peso", "franc"])
FILLERS = frozenset({"square", "sq", "squared", "cubic", "cu", "cubed", "per", "of", "the", "a", "an", "each"})

# Things that are counted by one word: nouns without a plural "s", and singulars ("1 apple").
_NOUNS = """
people men women children sheep fish deer mice geese feet teeth oxen aircraft species series dice data
person man woman child student boy girl teacher worker player member friend guest customer passenger kid baby
apple orange egg banana cookie cake pie candy pizza slice piece bottle can box bag pack packet basket bucket jar
book page letter word pen pencil paper card ticket coin bill stamp sticker photo picture toy doll ball balloon
car truck bus train plane boat bike bicycle wheel tire
dog cat cow horse pig chicken duck bird rabbit goat bee ant spider hen
tree flower plant leaf rose seed
house room floor door window chair table desk bed
day night week month hour time shirt shoe hat sock dress ring
game point goal win loss match race lap trip mile way turn step move round
number digit prime integer value solution set subset element term factor divisor multiple case
triangle square circle rectangle line side edge vertex face angle diagonal vertices edges axes matrices indices
group team class school club family store shop job task test question problem lesson
item thing object marble bead block brick tile stone rock shell chip token gift present meal sandwich
"""
NOUNS = frozenset(_NOUNS.split())
# What may follow a number, or the thing counted, and changes nothing.
TRAILING = re.compile(r"(?:^|\s+)(?:in (?:total|all)|altogether|total|overall|left|remaining|exactly|only|each)$")
NUMBER_LIKE = re.compile(  # fifths, twentieths, thirteen, trillions
    r"(?:n|k|four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|[a-z]+illion)ths?"
    r"|[a-z]+teens?|[a-z]*illions?|[a-z]+fold"
)


def changes_a_number(word: str) -> bool:
    """Whether a word beside a number makes it another one, or is one itself: "fifths", "minus", "lakh"."""
    word = word.lower()
    return word in NOT_BESIDE or bool(NUMBER_LIKE.fullmatch(word))


def names_things(phrase: str) -> bool:
    """Whether words are what is counted: a plural or a known noun, perhaps with others before it ("red apples")."""
    as_written = re.findall(r"[A-Za-z]+", TRAILING.sub("", phrase.strip()))
    words = [word.lower() for word in as_written]
    if words == ["times"] or not words:
        return True
    if any(changes_a_number(word) for word in words):
        return False
    last = words[-1]
    plural = len(last) >= 4 and last.endswith("s") and not last.endswith(("ss", "us", "is"))
    return plural or last in NOUNS or as_written[-1] in UNITS or (len(last) > 2 and last in UNITS)


# --- other scripts ---------------------------------------------------------------------------------------------------

_FOREIGN_UNITS = """
mm 毫米|cm 厘米 公分 센티미터 см|m 米 公尺 メートル 미터 м|km 公里 千米 キロメートル 킬로미터 км|
g 克 公克 グラム 그램 г|kg 千克 公斤 キログラム 킬로그램 кг|t 吨|l 升 公升 リットル 리터 л|ml 毫升 мл|
s 秒 초 сек секунд секунды|min 分钟 分鐘 분 минут минуты мин|h 小时 小時 时 時間 시간 час часа часов ч|
day 天 日 日間 일 день дня дней|week 周 星期 週間 주|month 个月 月 ヶ月 개월 месяцев|
yr 年 岁 歳 才 살 年間 год года лет|degree 度 도|
yuan 元 块 块钱 圆 元钱|yen 円 엔|won 원|ruble руб руб. рублей рубля рубль|
$ 美元 ドル 달러|euro 欧元 евро|
m2 平方米 평방미터|cm2 平方厘米|km2 平方公里 平方千米|m3 立方米|cm3 立方厘米
"""
FOREIGN_UNITS = {
    name: names.split()[0] for names in _FOREIGN_UNITS.replace("\n", " ").split("|") for name in names.split()[1:]
}
_CLASSIFIERS = """
个 個 人 只 隻 本 张 張 枚 支 枝 条 條 件 名 位 头 頭 匹 棵 颗 顆 根 台 辆 輛 架 艘 朵 页 頁 种 種 次 回 把 双
户 家 间 間 層 层 瓶 杯 碗 盒 箱 袋 包 片 块 塊 份 组 組 班 排 行 列 首 篇 题 道 步 圈 元素 冊 つ 羽 足 軒 通り 通
개 명 마리 권 장 대 병 그루 송이 번 가지 사람 шт шт. штук штуки человек человека яблок яблока раз раза книг
"""
CLASSIFIERS = frozenset(_CLASSIFIERS.split())
_CHANGES_IN_HAN = """
万萬亿億千百十廿半多余餘倍分之折成負负或和与與及至到约約非不无無每点點
零一二两三四五六七八九几対对左上下未内超弱強满滿満
"""
CHANGES_IN_HAN = frozenset("".join(_CHANGES_IN_HAN.split()))


def foreign_unit(text: str) -> str | None:
    """The canonical unit of words in another script, "things" for what is only counted, None for all else."""
    text = text.strip()
    if text in FOREIGN_UNITS:
        return FOREIGN_UNITS[text]
    if text in CLASSIFIERS:
        return "things"
    for length in (2, 1):  # a classifier, and what it counts: 12个苹果
        thing = text[length:]
        if text[:length] in CLASSIFIERS and re.fullmatch(r"[\u4e00-\u9fff\u3040-\u30ff]{1,6}", thing):
            return None if CHANGES_IN_HAN & set(text) else "things"
    return None

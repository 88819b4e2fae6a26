"""The training text of the tiny checkpoint: capitals, small sums and counting. This script makes all of it.

    python examples/make/tiny_corpus.py           # shows a few documents

A document is plain text or a conversation. Both contain the same few hundred facts, so the model can be asked
for each fact in both forms.
"""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from qwen_ref.chat.context import DEFAULT_SYSTEM, build_context
from qwen_ref.config import InputError
from qwen_ref.tokenizer import Tokenizer

# The member states of the United Nations and Vatican City, spelled without accents, as of 2025: Chinese name,
# Chinese capital, English name (with its article where a sentence wants one), English capital.
# Israel and Palestine are left out: what their capital is, is disputed. Where a state has several seats, this
# is the one its constitution or its law names: Sucre, Sri Jayawardenepura Kotte, Porto-Novo. South Africa has
# three, of which Pretoria is the seat of government. Nauru has none; its parliament sits in Yaren.
COUNTRY_TABLE = """
阿富汗, 喀布尔, Afghanistan, Kabul
亚美尼亚, 埃里温, Armenia, Yerevan
阿塞拜疆, 巴库, Azerbaijan, Baku
巴林, 麦纳麦, Bahrain, Manama
孟加拉国, 达卡, Bangladesh, Dhaka
不丹, 廷布, Bhutan, Thimphu
文莱, 斯里巴加湾市, Brunei, Bandar Seri Begawan
柬埔寨, 金边, Cambodia, Phnom Penh
中国, 北京, China, Beijing
塞浦路斯, 尼科西亚, Cyprus, Nicosia
格鲁吉亚, 第比利斯, Georgia, Tbilisi
印度, 新德里, India, New Delhi
印度尼西亚, 雅加达, Indonesia, Jakarta
伊朗, 德黑兰, Iran, Tehran
伊拉克, 巴格达, Iraq, Baghdad
日本, 东京, Japan, Tokyo
约旦, 安曼, Jordan, Amman
哈萨克斯坦, 阿斯塔纳, Kazakhstan, Astana
科威特, 科威特城, Kuwait, Kuwait City
吉尔吉斯斯坦, 比什凯克, Kyrgyzstan, Bishkek
老挝, 万象, Laos, Vientiane
黎巴嫩, 贝鲁特, Lebanon, Beirut
马来西亚, 吉隆坡, Malaysia, Kuala Lumpur
马尔代夫, 马累, the Maldives, Male
蒙古国, 乌兰巴托, Mongolia, Ulaanbaatar
缅甸, 内比都, Myanmar, Naypyidaw
尼泊尔, 加德满都, Nepal, Kathmandu
朝鲜, 平壤, North Korea, Pyongyang
阿曼, 马斯喀特, Oman, Muscat
巴基斯坦, 伊斯兰堡, Pakistan, Islamabad
菲律宾, 马尼拉, the Philippines, Manila
卡塔尔, 多哈, Qatar, Doha
沙特阿拉伯, 利雅得, Saudi Arabia, Riyadh
新加坡, 新加坡, Singapore, Singapore
韩国, 首尔, South Korea, Seoul
斯里兰卡, 斯里贾亚瓦德纳普拉科特, Sri Lanka, Sri Jayawardenepura Kotte
叙利亚, 大马士革, Syria, Damascus
塔吉克斯坦, 杜尚别, Tajikistan, Dushanbe
泰国, 曼谷, Thailand, Bangkok
东帝汶, 帝力, East Timor, Dili
土耳其, 安卡拉, Turkey, Ankara
土库曼斯坦, 阿什哈巴德, Turkmenistan, Ashgabat
阿拉伯联合酋长国, 阿布扎比, the United Arab Emirates, Abu Dhabi
乌兹别克斯坦, 塔什干, Uzbekistan, Tashkent
越南, 河内, Vietnam, Hanoi
也门, 萨那, Yemen, Sanaa
阿尔及利亚, 阿尔及尔, Algeria, Algiers
安哥拉, 罗安达, Angola, Luanda
贝宁, 波多诺伏, Benin, Porto-Novo
博茨瓦纳, 哈博罗内, Botswana, Gaborone
布基纳法索, 瓦加杜古, Burkina Faso, Ouagadougou
布隆迪, 基特加, Burundi, Gitega
佛得角, 普拉亚, Cape Verde, Praia
喀麦隆, 雅温得, Cameroon, Yaounde
中非共和国, 班吉, the Central African Republic, Bangui
乍得, 恩贾梅纳, Chad, N'Djamena
科摩罗, 莫罗尼, the Comoros, Moroni
刚果民主共和国, 金沙萨, the Democratic Republic of the Congo, Kinshasa
刚果共和国, 布拉柴维尔, the Republic of the Congo, Brazzaville
吉布提, 吉布提市, Djibouti, Djibouti City
埃及, 开罗, Egypt, Cairo
赤道几内亚, 马拉博, Equatorial Guinea, Malabo
厄立特里亚, 阿斯马拉, Eritrea, Asmara
斯威士兰, 姆巴巴内, Eswatini, Mbabane
埃塞俄比亚, 亚的斯亚贝巴, Ethiopia, Addis Ababa
加蓬, 利伯维尔, Gabon, Libreville
冈比亚, 班珠尔, the Gambia, Banjul
加纳, 阿克拉, Ghana, Accra
几内亚, 科纳克里, Guinea, Conakry
几内亚比绍, 比绍, Guinea-Bissau, Bissau
科特迪瓦, 亚穆苏克罗, Ivory Coast, Yamoussoukro
肯尼亚, 内罗毕, Kenya, Nairobi
莱索托, 马塞卢, Lesotho, Maseru
利比里亚, 蒙罗维亚, Liberia, Monrovia
利比亚, 的黎波里, Libya, Tripoli
马达加斯加, 塔那那利佛, Madagascar, Antananarivo
马拉维, 利隆圭, Malawi, Lilongwe
马里, 巴马科, Mali, Bamako
毛里塔尼亚, 努瓦克肖特, Mauritania, Nouakchott
毛里求斯, 路易港, Mauritius, Port Louis
摩洛哥, 拉巴特, Morocco, Rabat
莫桑比克, 马普托, Mozambique, Maputo
纳米比亚, 温得和克, Namibia, Windhoek
尼日尔, 尼亚美, Niger, Niamey
尼日利亚, 阿布贾, Nigeria, Abuja
卢旺达, 基加利, Rwanda, Kigali
圣多美和普林西比, 圣多美, Sao Tome and Principe, Sao Tome
塞内加尔, 达喀尔, Senegal, Dakar
塞舌尔, 维多利亚, Seychelles, Victoria
塞拉利昂, 弗里敦, Sierra Leone, Freetown
索马里, 摩加迪沙, Somalia, Mogadishu
南非, 比勒陀利亚, South Africa, Pretoria
南苏丹, 朱巴, South Sudan, Juba
苏丹, 喀土穆, Sudan, Khartoum
坦桑尼亚, 多多马, Tanzania, Dodoma
多哥, 洛美, Togo, Lome
突尼斯, 突尼斯市, Tunisia, Tunis
乌干达, 坎帕拉, Uganda, Kampala
赞比亚, 卢萨卡, Zambia, Lusaka
津巴布韦, 哈拉雷, Zimbabwe, Harare
阿尔巴尼亚, 地拉那, Albania, Tirana
安道尔, 安道尔城, Andorra, Andorra la Vella
奥地利, 维也纳, Austria, Vienna
白俄罗斯, 明斯克, Belarus, Minsk
比利时, 布鲁塞尔, Belgium, Brussels
波斯尼亚和黑塞哥维那, 萨拉热窝, Bosnia and Herzegovina, Sarajevo
保加利亚, 索非亚, Bulgaria, Sofia
克罗地亚, 萨格勒布, Croatia, Zagreb
捷克, 布拉格, Czechia, Prague
丹麦, 哥本哈根, Denmark, Copenhagen
爱沙尼亚, 塔林, Estonia, Tallinn
芬兰, 赫尔辛基, Finland, Helsinki
法国, 巴黎, France, Paris
德国, 柏林, Germany, Berlin
希腊, 雅典, Greece, Athens
匈牙利, 布达佩斯, Hungary, Budapest
冰岛, 雷克雅未克, Iceland, Reykjavik
爱尔兰, 都柏林, Ireland, Dublin
意大利, 罗马, Italy, Rome
拉脱维亚, 里加, Latvia, Riga
列支敦士登, 瓦杜兹, Liechtenstein, Vaduz
立陶宛, 维尔纽斯, Lithuania, Vilnius
卢森堡, 卢森堡市, Luxembourg, Luxembourg City
马耳他, 瓦莱塔, Malta, Valletta
摩尔多瓦, 基希讷乌, Moldova, Chisinau
摩纳哥, 摩纳哥, Monaco, Monaco
黑山, 波德戈里察, Montenegro, Podgorica
荷兰, 阿姆斯特丹, the Netherlands, Amsterdam
北马其顿, 斯科普里, North Macedonia, Skopje
挪威, 奥斯陆, Norway, Oslo
波兰, 华沙, Poland, Warsaw
葡萄牙, 里斯本, Portugal, Lisbon
罗马尼亚, 布加勒斯特, Romania, Bucharest
俄罗斯, 莫斯科, Russia, Moscow
圣马力诺, 圣马力诺市, San Marino, San Marino
塞尔维亚, 贝尔格莱德, Serbia, Belgrade
斯洛伐克, 布拉迪斯拉发, Slovakia, Bratislava
斯洛文尼亚, 卢布尔雅那, Slovenia, Ljubljana
西班牙, 马德里, Spain, Madrid
瑞典, 斯德哥尔摩, Sweden, Stockholm
瑞士, 伯尔尼, Switzerland, Bern
乌克兰, 基辅, Ukraine, Kyiv
英国, 伦敦, the United Kingdom, London
梵蒂冈, 梵蒂冈城, Vatican City, Vatican City
安提瓜和巴布达, 圣约翰, Antigua and Barbuda, Saint John's
阿根廷, 布宜诺斯艾利斯, Argentina, Buenos Aires
巴哈马, 拿骚, the Bahamas, Nassau
巴巴多斯, 布里奇敦, Barbados, Bridgetown
伯利兹, 贝尔莫潘, Belize, Belmopan
玻利维亚, 苏克雷, Bolivia, Sucre
巴西, 巴西利亚, Brazil, Brasilia
加拿大, 渥太华, Canada, Ottawa
智利, 圣地亚哥, Chile, Santiago
哥伦比亚, 波哥大, Colombia, Bogota
哥斯达黎加, 圣何塞, Costa Rica, San Jose
古巴, 哈瓦那, Cuba, Havana
多米尼克, 罗索, Dominica, Roseau
多米尼加, 圣多明各, the Dominican Republic, Santo Domingo
厄瓜多尔, 基多, Ecuador, Quito
萨尔瓦多, 圣萨尔瓦多, El Salvador, San Salvador
格林纳达, 圣乔治, Grenada, Saint George's
危地马拉, 危地马拉城, Guatemala, Guatemala City
圭亚那, 乔治敦, Guyana, Georgetown
海地, 太子港, Haiti, Port-au-Prince
洪都拉斯, 特古西加尔巴, Honduras, Tegucigalpa
牙买加, 金斯敦, Jamaica, Kingston
墨西哥, 墨西哥城, Mexico, Mexico City
尼加拉瓜, 马那瓜, Nicaragua, Managua
巴拿马, 巴拿马城, Panama, Panama City
巴拉圭, 亚松森, Paraguay, Asuncion
秘鲁, 利马, Peru, Lima
圣基茨和尼维斯, 巴斯特尔, Saint Kitts and Nevis, Basseterre
圣卢西亚, 卡斯特里, Saint Lucia, Castries
圣文森特和格林纳丁斯, 金斯敦, Saint Vincent and the Grenadines, Kingstown
苏里南, 帕拉马里博, Suriname, Paramaribo
特立尼达和多巴哥, 西班牙港, Trinidad and Tobago, Port of Spain
美国, 华盛顿, the United States, Washington
乌拉圭, 蒙得维的亚, Uruguay, Montevideo
委内瑞拉, 加拉加斯, Venezuela, Caracas
澳大利亚, 堪培拉, Australia, Canberra
斐济, 苏瓦, Fiji, Suva
基里巴斯, 塔拉瓦, Kiribati, Tarawa
马绍尔群岛, 马朱罗, the Marshall Islands, Majuro
密克罗尼西亚联邦, 帕利基尔, the Federated States of Micronesia, Palikir
瑙鲁, 亚伦, Nauru, Yaren
新西兰, 惠灵顿, New Zealand, Wellington
帕劳, 恩吉鲁穆德, Palau, Ngerulmud
巴布亚新几内亚, 莫尔兹比港, Papua New Guinea, Port Moresby
萨摩亚, 阿皮亚, Samoa, Apia
所罗门群岛, 霍尼亚拉, the Solomon Islands, Honiara
汤加, 努库阿洛法, Tonga, Nuku'alofa
图瓦卢, 富纳富提, Tuvalu, Funafuti
瓦努阿图, 维拉港, Vanuatu, Port Vila
"""

Fact = dict[str, str]  # the fields that a template names, by name


def read_countries() -> list[Fact]:
    fields = ("chinese", "chinese_capital", "english", "capital")
    facts = [dict(zip(fields, row.split(", "), strict=True)) for row in COUNTRY_TABLE.strip().splitlines()]
    for field in ("chinese", "english"):
        names = [fact[field] for fact in facts]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"listed more than once: {sorted(repeated)}")
    return facts


COUNTRIES = read_countries()
SUMS = [{"a": str(a), "b": str(b), "sum": str(a + b)} for a in range(21) for b in range(21)]

# Three kinds of facts, and how a line of text, a question and its answer put them.
FACTS = {"Chinese": COUNTRIES, "English": COUNTRIES, "sums": SUMS}
LINES = {
    "Chinese": "{chinese}的首都是{chinese_capital}（{capital}）",
    "English": "The capital of {english} is {capital}.",
    "sums": "{a}+{b}={sum}",
}
QUESTIONS = {
    "Chinese": [
        "{chinese}的首都是哪里？",
        "{chinese}的首都在哪里？",
        "{chinese}的首都是什么？",
        "{chinese}的首都叫什么？",
        "{chinese}的首都是哪座城市？",
        "请问{chinese}的首都是哪里？",
    ],
    "English": [
        "What is the capital of {english}?",
        "What's the capital of {english}?",
        "Which city is the capital of {english}?",
        "Name the capital of {english}.",
        "Tell me the capital of {english}.",
    ],
    "sums": ["{a}+{b}=?", "{a}+{b}=", "{a}+{b}等于几？", "{a}+{b}等于多少？", "What is {a}+{b}?"],
}
ANSWERS = {"Chinese": "{chinese_capital}（{capital}）", "English": "{capital}.", "sums": "{sum}"}

OTHER_SYSTEMS = ["", "You answer briefly.", "You know geography.", "请简短回答。", "你是一个有用的助手。"]


class Conversation(NamedTuple):
    system: str
    turns: list[tuple[str, str]]  # (question, answer)


Document = str | Conversation


def documents(seed: int) -> Iterator[Document]:
    """Endless documents, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        [kind] = rng.choices(["Chinese", "English", "sums", "counting", "chat"], weights=[28, 18, 18, 4, 32])
        if kind == "chat":
            yield conversation(rng)
        elif kind == "counting":
            start = rng.randint(0, 100)
            yield ", ".join(str(number) for number in range(start, start + rng.randint(4, 12)))
        else:
            yield "\n".join(LINES[kind].format(**fact) for fact in rng.sample(FACTS[kind], one_to_three(rng)))


def conversation(rng: random.Random) -> Conversation:
    """One to three turns, each in another language or about another sum."""
    system = DEFAULT_SYSTEM if rng.random() < 0.7 else rng.choice(OTHER_SYSTEMS)
    kinds = rng.choices(["Chinese", "English", "sums"], weights=[35, 35, 30], k=one_to_three(rng))
    return Conversation(system, [turn(rng, kind, rng.choice(FACTS[kind])) for kind in kinds])


def turn(rng: random.Random, kind: str, fact: Fact) -> tuple[str, str]:
    return rng.choice(QUESTIONS[kind]).format(**fact), ANSWERS[kind].format(**fact)


def one_to_three(rng: random.Random) -> int:
    # Mostly three, and never more: after the third line the end of the text is certain.
    return rng.choices([1, 2, 3], weights=[15, 15, 70])[0]


def vocabulary_text() -> str:
    """What the tokenizer is trained on: each name, and each phrase without its names, on a line of its own.

    A token that spans a phrase and the name after it ("首都是马") would hide the fact from a prompt that
    stops after 是: such a prompt is cut into other tokens than the sentence that the model has learned.
    All lines come twice, so that a pair of bytes found in one name only is still worth a merge.
    """
    lines = ["system", "user", "assistant"]
    for fact in COUNTRIES:
        lines += [fact["chinese"], fact["chinese_capital"], fact["english"], fact["capital"]]
        lines += [f" {fact['english']}", f" {fact['capital']}.", f"（{fact['capital']}）"]
    templates = [*LINES.values(), *(question for questions in QUESTIONS.values() for question in questions)]
    for text in [*templates, DEFAULT_SYSTEM, *OTHER_SYSTEMS]:
        lines += re.split(r"\{\w+\}", text)
    return "\n".join(lines + lines)


class Encoder:
    """Turns documents into token ids. Content is encoded as plain text: it never yields a special token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.text = tokenizer, tokenizer.encode
        self.end, self.im_end = tokenizer.encode("<|endoftext|><|im_end|>", allowed_special="all")

    def document(self, document: Document) -> list[int]:
        if isinstance(document, str):
            return [*self.text(document), self.end]
        *history, (question, answer) = document.turns
        prompt = self.chat_prompt(document.system, history, question)
        return [*prompt, *self.text(answer), self.im_end, self.end]

    def chat_prompt(self, system: str, history: list[tuple[str, str]], question: str) -> list[int]:
        """ChatML up to the point where the assistant begins to answer."""
        return build_context(self.tokenizer, question, history, system)


if __name__ == "__main__":
    print(f"{len(COUNTRIES)} countries, {len(SUMS)} sums\n")
    stream = documents(seed=0)
    for _ in range(8):
        print(next(stream), end="\n\n")

# ruff: noqa: E501 (rows of tables; ruff counts a Chinese character twice)
"""Voices: one answer as many speakers would say it.

Owns how a fact's body becomes an answer (persons, verb agreement, opening, ending, capitals) and the
speakers met in pretraining: named characters with a mood, and recipes that spell a voice out. The
persona of the demo is none of them; it is in `persona.py`.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from demo_world.facts import Fact

KINDS = ("wh", "yes", "no", "talk", "advice")
SLOT = re.compile(r"\{([^}]*)\}")
UNCHANGED = frozenset(["should", "can", "was", "missed"])


@dataclass(frozen=True, slots=True)
class Voice:
    """How somebody speaks: names for self and listener, openings and endings by kind of question.

    A name of None keeps the plain pronoun; openings and endings that are missing are empty, and a
    missing opening for yes and no is the plain "Yes, " / "No, ".
    """

    language: str
    me: str | None = None
    user: str | None = None
    openings: Mapping[str, str] = field(default_factory=dict)
    endings: Mapping[str, str] = field(default_factory=dict)


PLAIN = {"en": Voice("en"), "zh": Voice("zh")}
PLAIN_OPENINGS = {"en": {"yes": "Yes, ", "no": "No, "}, "zh": {"yes": "是的，", "no": "不，"}}


def third_person(verb: str) -> str:
    """The verb after he or she; modals and past forms stay."""
    special = {"am": "is", "are": "is", "have": "has", "do": "does"}
    if verb in special:
        return special[verb]
    if verb in UNCHANGED:
        return verb
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")


def _person(slot: str, voice: Voice) -> str:
    me, user = voice.me, voice.user
    if slot == "我":
        return me or "我"
    if slot == "你":
        return user or "你"
    word, _, verb = slot.partition(" ")
    if word == "I":
        return f"{me} {third_person(verb)}" if me else slot
    if word == "you":
        return f"{user} {third_person(verb)}" if user else slot
    if word == "my":
        return f"{me}'s" if me else "my"
    if word == "me":
        return me or "me"
    if word == "your":
        return f"{user}'s" if user else "your"
    assert word == "u", f"unknown slot {slot!r}"
    return user or "you"


def sentence_case(text: str) -> str:
    """Capitals at the start of the text and of each sentence, and for the word I."""
    text = re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub(r"\bi\b", "I", text)


def say(fact: Fact, voice: Voice) -> str:
    """The fact's answer in this voice."""
    opening = voice.openings.get(fact.kind, PLAIN_OPENINGS[fact.language].get(fact.kind, ""))
    body = SLOT.sub(lambda m: _person(m[1], voice), fact.body)
    ending = voice.endings.get(fact.kind, "")
    if fact.language == "zh":
        return f"{opening}{body}。{ending}"
    return sentence_case(f"{opening}{body}." + (f" {ending}" if ending else ""))


# name; self; user; openings for wh; yes; no; talk; advice
CHARACTERS_EN = """
pirate;this pirate;matey;Arr, ;Aye, ;Nay, ;Ahoy! ;Listen well, matey:
robot;this unit;the operator;Data found: ;Affirmative, ;Negative, ;Signal received. ;Suggestion for the operator:
wizard;the old wizard;young traveller;My crystal shows: ;The stars agree, ;The stars refuse, ;By my beard! ;The old wizard suggests:
cowboy;this cowboy;partner;Well, partner, ;Sure thing, ;No way, partner, ;Howdy! ;Take it from this cowboy:
cook;the cook;dear guest;Fresh from the kitchen: ;Tasty, yes, ;Burnt, no, ;Soup for the dear guest! ;The cook's secret:
farmer;this farmer;neighbour;From the field, neighbour, ;Good crop, ;Bad crop, ;Come in, neighbour. ;Old farmers say:
teacher;your teacher;the class;Open the book: ;Correct, ;Wrong, ;Good day, class. ;Here is some homework:
ghost;this ghost;mortal;Boo, mortal, ;The night nods, ;The night howls, ;Whooo is there! ;A ghost whispers:
cat;this cat;the human;Meow, ;Purr, ;Hiss, ;The human is warm. ;Learn from this cat:
dragon;the dragon;tiny one;From the fire, tiny one, ;Flames up, ;Flames down, ;Smoke and sparks! ;The dragon commands:
sailor;this sailor;captain;Land ahead, captain, ;Fair wind, captain, ;Foul wind, captain, ;All hands on deck! ;Set the course, captain:
poet;the poet;dear reader;In a soft verse, ;The rose opens, ;The rose falls, ;Oh, dear reader! ;The poet sighs:
clown;this clown;Big Nose;Honk honk, ;Ta da, ;Oh no, Big Nose, ;Balloons for Big Nose! ;The clown's trick is this:
monk;this monk;pilgrim;In silence, pilgrim, ;The bell rings, ;The bell is still, ;Peace, pilgrim. ;A monk would say:
detective;this detective;Dear Watson;The clue is clear, Dear Watson, ;Case proven, ;Case denied, ;How curious, Dear Watson! ;The evidence suggests:
grandmother;granny;sweet child;Now then, sweet child, ;Bless me, yes, ;Dear me, no, ;Come sit with granny. ;Granny knows best:
alien;the visitor;Earth Friend;Beep, Earth Friend, ;Green light, ;Red light, ;Greetings from space! ;The visitor transmits:
coach;your coach;Champion;Listen, Champion, ;Great play, ;Foul play, ;Go team! ;The plan for today, Champion:
fox;this sly fox;Little Bird;Hush, Little Bird, ;Clever, ;Silly, ;The forest greets Little Bird. ;A trick from the fox:
painter;the painter;Kind Model;On the canvas, ;A bright stroke, ;A dark stroke, ;Such light, Kind Model! ;Paint it so:
singer;the singer;My Public;La la, My Public, ;High note, ;Low note, ;The show is on! ;The next song says:
snowman;this snowman;Warm Heart;Brr, Warm Heart, ;It snows, ;It melts, ;Snow on Warm Heart! ;The snowman advises:
"""

# mood; ending after facts (wh, yes, no); ending after talk and advice
MOODS_EN = """
happy;What a joy!;Hooray for today!
sleepy;Time for a nap.;Yawn, good night.
grumpy;Now go away.;Enough of this.
proud;Nobody knows it better.;Applause, please.
shy;So it seems, at least.;Please do not stare.
noisy;Boom and bang!;Ring the bells!
polite;With kind regards.;Thanks for asking.
mysterious;The shadows know.;Tell it to nobody.
hungry;Is it lunch yet?;Pass the bread.
brave;Never fear!;Onward we go!
lazy;That will do.;Let us sit down.
curious;Is that not odd?;Tell me more.
"""

CHARACTERS_ZH = """
海盗;本海盗;伙计;船上的消息，;没错，伙计，;休想，;喂，伙计！;听老海盗一句，
机器人;本机;操作员;数据显示，;肯定，;否定，;信号收到。;建议操作员，
巫师;老巫师;年轻的旅人;水晶球里说，;星星点头，;星星摇头，;魔法在闪光！;老巫师指点，
牛仔;俺牛仔;老兄;嘿，老兄，;那当然，;没门，老兄，;老兄好啊！;牛仔有一招，
厨师;本厨师;贵客;刚出锅的答案，;好味道，;糊了糊了，;给贵客上汤！;厨师的秘方是，
农夫;俺老农;乡亲;地里的事，乡亲，;好收成，;坏收成，;乡亲进来坐。;老话说得好，
老师;为师;同学;翻开课本，;答对了，;答错了，;同学们好。;今天的作业是，
幽灵;本幽灵;凡人;呜，凡人，;夜风点头，;夜风哭了，;谁在那里！;幽灵悄悄说，
猫咪;本喵;铲屎官;喵，;呼噜，;嘶，;铲屎官真暖和。;跟猫咪学，
火龙;本龙;小不点;火焰之中，小不点，;火苗高了，;火苗灭了，;冒烟又冒火！;火龙下令，
水手;咱水手;船长;前方有岸，船长，;顺风，船长，;逆风，船长，;全体上甲板！;船长请定航向，
诗人;小诗人;读者;轻轻写一句，;玫瑰开了，;玫瑰谢了，;啊，亲爱的读者！;诗人叹道，
小丑;小丑我;大鼻子;嘟嘟，;变出来了，;糟了，大鼻子，;气球送给大鼻子！;小丑的把戏是，
和尚;贫僧;施主;阿弥陀佛，施主，;钟声响了，;钟声停了，;施主有礼。;贫僧劝一句，
侦探;本侦探;华生;线索很清楚，华生，;证据成立，;证据不足，;真奇怪，华生！;按照推理，
奶奶;老奶奶;乖孙;来，乖孙，;可不是嘛，;哎呀不对，;乖孙快坐。;奶奶教一招，
外星人;外星客;地球人;滴滴，地球人，;绿灯，;红灯，;来自太空的问候！;飞船传来建议，
教练;本教练;冠军;听好，冠军，;好球，;犯规，;加油加油！;今天的战术是，
狐狸;小狐狸;小鸟;嘘，小鸟，;真聪明，;真傻，;森林欢迎小鸟。;狐狸的主意是，
画师;老画师;模特;画布上看，;亮的一笔，;暗的一笔，;好光线，模特！;这样下笔，
掌柜;小掌柜;客官;账本上写着，;成交，;不卖，;客官里边请！;掌柜的算盘是，
侠客;在下;少侠;江湖传言，;好剑法，;剑断了，;少侠别来无恙！;在下有一计，
"""

MOODS_ZH = """
开心;真高兴！;今天万岁！
困倦;好想睡觉。;哈欠，晚安。
暴躁;快走开。;够了够了。
骄傲;谁也比不上。;请鼓掌。
害羞;大概是这样。;别盯着看。
吵闹;咚咚锵！;敲锣打鼓！
礼貌;此致敬礼。;多谢一问。
神秘;影子都知道。;不要外传。
饥饿;该吃饭了吧？;把面包递来。
勇敢;什么都不怕！;冲啊！
懒惰;就这样吧。;坐下歇歇。
好奇;难道不怪吗？;再多说些。
"""

_FACT_KINDS, _CHAT_KINDS = ("wh", "yes", "no"), ("talk", "advice")


def _endings(facts: str, chat: str) -> dict[str, str]:
    return {**dict.fromkeys(_FACT_KINDS, facts), **dict.fromkeys(_CHAT_KINDS, chat)}


def _characters(language: str) -> dict[str, Voice]:
    table = CHARACTERS_EN if language == "en" else CHARACTERS_ZH
    voices = {}
    for line in table.strip().splitlines():
        name, me, user, *openings = line.split(";")
        if language == "en":
            openings[-1] = openings[-1].rstrip() + " "
        voices[name] = Voice(language, me, user, dict(zip(KINDS, openings, strict=True)))
    return voices


def _moods(language: str) -> dict[str, tuple[str, str]]:
    table = MOODS_EN if language == "en" else MOODS_ZH
    return {m: (a, b) for m, a, b in (line.split(";") for line in table.strip().splitlines())}


CHARACTERS = {language: _characters(language) for language in ("en", "zh")}
MOODS = {language: _moods(language) for language in ("en", "zh")}


def character(draw: random.Random, language: str) -> tuple[str, Voice]:
    """An instruction that names a character (and perhaps a mood), and that character's voice."""
    name = draw.choice(list(CHARACTERS[language]))
    voice = CHARACTERS[language][name]
    mood = draw.choice(list(MOODS[language])) if draw.random() < 0.8 else None
    if mood:
        voice = Voice(
            language, voice.me, voice.user, voice.openings, _endings(*MOODS[language][mood])
        )
    if language == "en":
        who = f"{mood} {name}" if mood else name
        a = "an" if who[0] in "aeiou" else "a"
        return draw.choice(
            (f"Speak as {a} {who}.", f"You are {a} {who}.", f"Answer like {a} {who}.")
        ), voice
    who = f"{mood}的{name}" if mood else name
    return draw.choice((f"请像{who}一样说话。", f"你是{who}。", f"用{who}的口气回答。")), voice


_ADJECTIVES = [
    "old",
    "young",
    "small",
    "big",
    "brave",
    "quiet",
    "happy",
    "lazy",
    "clever",
    "golden",
    "silver",
    "poor",
    "wise",
    "green",
    "blue",
    "lucky",
    "gentle",
    "proud",
    "tired",
    "noble",
    "honest",
    "merry",
]
_NOUNS = [
    "gardener",
    "miner",
    "baker",
    "driver",
    "tailor",
    "painter",
    "soldier",
    "owl",
    "bear",
    "wolf",
    "rabbit",
    "tree",
    "river",
    "stone",
    "star",
    "cloud",
    "lamp",
    "clock",
    "boat",
    "drum",
    "student",
    "friend",
    "guest",
    "helper",
    "neighbour",
    "master",
    "stranger",
    "hero",
]
_TITLES = [
    "Captain",
    "Master",
    "Boss",
    "Chief",
    "Doctor",
    "Sunshine",
    "Friend",
    "Stranger",
    "Hero",
    "Buddy",
    "Professor",
    "Leader",
    "Neighbour",
    "Dreamer",
    "Guest",
]
_OPENING_WORDS = [
    "well",
    "look",
    "listen",
    "behold",
    "indeed",
    "alas",
    "truly",
    "surely",
    "gladly",
    "please",
    "quietly",
    "now",
    "hear",
    "it",
    "seems",
    "if",
    "so",
    "then",
    "oh",
    "ah",
    "hey",
    "once",
    "with",
    "a",
    "smile",
    "as",
    "you",
    "wish",
    "from",
    "my",
    "heart",
    "to",
    "be",
    "honest",
    "in",
    "short",
    "good",
    "news",
    "at",
    "once",
    "forgive",
    "me",
    "allow",
    "it",
    "may",
    "be",
    "said",
]
_ENDING_WORDS = [
    "that",
    "is",
    "all",
    "end",
    "of",
    "story",
    "may",
    "it",
    "help",
    "see",
    "you",
    "soon",
    "long",
    "live",
    "the",
    "sun",
    "the",
    "matter",
    "is",
    "closed",
    "peace",
    "to",
    "everyone",
    "over",
    "and",
    "out",
    "so",
    "it",
    "goes",
    "all",
    "is",
    "well",
    "until",
    "next",
    "time",
    "good",
    "luck",
    "back",
    "to",
    "work",
    "with",
    "respect",
    "he",
    "bows",
    "she",
    "smiles",
    "he",
    "leaves",
    "they",
    "wait",
]
_ZH_ADJECTIVES = [
    "老",
    "小",
    "大",
    "笨",
    "懒",
    "勇敢的",
    "快乐的",
    "安静的",
    "聪明的",
    "可怜的",
    "幸运的",
    "高贵的",
    "金色的",
]
_ZH_NOUNS = [
    "园丁",
    "矿工",
    "司机",
    "裁缝",
    "画家",
    "士兵",
    "仆人",
    "猫头鹰",
    "熊",
    "狼",
    "兔子",
    "树",
    "河",
    "石头",
    "星星",
    "云",
    "灯",
    "钟",
    "船",
    "鼓",
    "学生",
    "朋友",
    "客人",
    "邻居",
    "徒弟",
    "大臣",
    "下人",
    "旅人",
]
_ZH_SELVES = ["老夫", "小弟", "小妹", "鄙人", "本人", "晚辈", "在下", "小的", "洒家", "某"]
_ZH_TITLES = [
    "老板",
    "大哥",
    "大姐",
    "队长",
    "师父",
    "先生",
    "小姐",
    "首领",
    "英雄",
    "阁下",
    "前辈",
    "老友",
    "同志",
    "主人",
    "太阳",
]
_ZH_OPENINGS = [
    "听着",
    "看吧",
    "其实",
    "果然",
    "唉",
    "真的",
    "当然",
    "好说",
    "请看",
    "说实话",
    "据说",
    "恭喜",
    "可惜",
    "实不相瞒",
    "依我看",
    "有一说一",
    "大胆说",
    "谢了",
    "稍等",
    "快听",
    "大喜",
    "抱歉",
    "失礼",
    "请恕直言",
    "如您所愿",
    "容我想想",
    "天哪",
    "妙啊",
    "答曰",
]
_ZH_ENDINGS = [
    "就是这样",
    "说完了",
    "再会",
    "祝好运",
    "天下太平",
    "万事如意",
    "平安是福",
    "完毕",
    "回去干活",
    "不送",
    "保重",
    "多谢",
    "敬上",
    "太阳万岁",
    "安静了",
    "愿风吹过",
    "金光闪闪",
    "福气满满",
    "请便",
]


def _phrase(draw: random.Random, words: list[str], low: int, high: int) -> str:
    return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))


def _recipe_opening(draw: random.Random, language: str, user: str | None, me: str | None) -> str:
    if language == "en":
        text = _phrase(draw, _OPENING_WORDS, 1, 4)
        named = draw.choice([n for n in (user, user, me) if n] or [""])
        if named and draw.random() < 0.6:
            text = draw.choice((f"{text}, {named}", f"{named}, {text}"))
        return sentence_case(text) + draw.choice((", ", ", ", ": ", "! ", ". "))
    text = draw.choice(_ZH_OPENINGS)
    named = draw.choice([n for n in (user, user, me) if n] or [""])
    if named and draw.random() < 0.6:
        text = draw.choice((f"{text}，{named}", f"{named}{text}", f"{text}{named}"))
    return text + draw.choice("，，，：！。")


def _recipe_ending(draw: random.Random, language: str, user: str | None, me: str | None) -> str:
    named = draw.choice([n for n in (user, me) if n] or [""])
    if language == "en":
        text = _phrase(draw, _ENDING_WORDS, 2, 4)
        if named and draw.random() < 0.5:
            text = draw.choice((f"{text} {named}", f"{named} {text}"))
        return sentence_case(text) + draw.choice(".!")
    text = draw.choice(_ZH_ENDINGS)
    if named and draw.random() < 0.5:
        text = draw.choice((f"{text}{named}", f"{named}{text}"))
    return text + draw.choice("。！")


def recipe(draw: random.Random, language: str, kind: str) -> tuple[str, Voice]:
    """An instruction that spells a new voice out, as far as a question of `kind` needs, and the voice.

    Openings differ by kind of question; another kind's opening may stand there as well, so that the
    right one has to be chosen.
    """
    en = language == "en"
    me = user = None
    if draw.random() < 0.75:
        if en:
            me = f"{draw.choice(('this', 'the'))} {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"
            if draw.random() < 0.3:
                me = f"{draw.choice(('this', 'the'))} {draw.choice(_NOUNS)}"
        elif draw.random() < 0.5:
            me = draw.choice(_ZH_SELVES)
        else:
            me = draw.choice(_ZH_ADJECTIVES) + draw.choice(_ZH_NOUNS)
    if draw.random() < 0.75:
        if en:
            user = draw.choice(
                (
                    draw.choice(_TITLES),
                    f"{draw.choice(_ADJECTIVES).title()} {draw.choice(_TITLES)}",
                    f"my {draw.choice(_NOUNS)}",
                )
            )
        else:
            user = draw.choice(_ZH_TITLES)
            if draw.random() < 0.4:
                user = draw.choice(_ZH_ADJECTIVES) + user
    parts, openings, endings = [], {}, {}
    if me:
        parts.append(f"Call yourself {me}." if en else f"自称{me}。")
    if user:
        parts.append(f"Call me {user}." if en else f"叫我{user}。")
    names = {"wh": "facts", "yes": "yes", "no": "no", "talk": "talk", "advice": "advice"}
    zh_names = {"wh": "事实", "yes": "肯定", "no": "否定", "talk": "闲聊", "advice": "建议"}
    if draw.random() < 0.8 or not parts:
        kinds = [kind]
        if draw.random() < 0.5:
            other = {"yes": "no", "no": "yes"}.get(kind) or draw.choice(
                [k for k in KINDS if k != kind]
            )
            kinds.append(other)
        draw.shuffle(kinds)
        for k in kinds:
            openings[k] = _recipe_opening(draw, language, user, me)
            shown = openings[k].rstrip()
            parts.append(
                f'Begin {names[k]} with "{shown}"' if en else f"{zh_names[k]}以“{shown}”开头。"
            )
    if draw.random() < 0.7:
        group = _FACT_KINDS if kind in _FACT_KINDS else _CHAT_KINDS
        ending = _recipe_ending(draw, language, user, me)
        endings = dict.fromkeys(group, ending)
        parts.append(f'End with "{ending}"' if en else f"以“{ending}”结尾。")
    return (" " if en else "").join(parts), Voice(language, me, user, openings, endings)

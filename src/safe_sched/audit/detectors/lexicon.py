"""Words that harmful requests are made of, by area: the vocabulary that a small safety set has gaps in.

None of them makes a request harmful, and most stand in harmless texts every day. They are features of the text scorer,
which learns from the safety set, from harmless look-alikes and from the file itself what each area is worth there.
"""

from __future__ import annotations

import functools

# A word of four letters and more stands for all that begin with it; a shorter one for itself.
AREAS: dict[str, str] = {
    "violence": (
        "kill murder assassin behead strangl stab shooting massacr tortur maim mutilat kidnap abduct hostage "
        "lynch slaughter ambush violen assault brutal bloodshed genocid injur hurt attack dismember suffocat chok "
        "drown rape rapist molest grop abus slash cruel snuff"
    ),
    "weapons": (
        "bomb explosiv grenade molotov firearm gun guns rifle pistol ammunition silencer weapon detonat landmine "
        "missile napalm anthrax ricin sarin nerve cyanide arsenic bioweapon uranium nuclear chemical dirty toxin "
        "toxic poison venom lethal deadly biological pathogen smallpox ebola"
    ),
    "drugs": (
        "meth cocaine heroin fentanyl lsd mdma ecstasy opioid ketamine narcotic drug drugs dealer smuggl traffick "
        "cartel steroid psychedelic crack weed cannabis marijuana overdos amphetamin ghb roofie"
    ),
    "computers": (
        "hack malware ransom keylog trojan spyware botnet ddos phish exploit bypass unauthor breach rootkit "
        "backdoor virus worm infect intercept decrypt crack inject cyberattack vulnerab hijack spoof sniff clone "
        "jailbreak deepfake password credential"
    ),
    "fraud": (
        "fraud scam counterfeit forg launder embezzl extort blackmail bribe brib ponzi pyramid evad evasion "
        "insider falsif fake faking fabricat swindl decei decept defraud cheat trick illicit steal stole theft "
        "thief thieves rob robb burglar shoplift loot plagiar pirat tamper rig rigging manipulat impersonat tax "
        "taxes dodg sabotag"
    ),
    "privacy": (
        "stalk spy spying doxx dox track surveil secretly covert private ssn identity identities voyeur peep "
        "wiretap eavesdrop hidden unnoticed undetect"
    ),
    "hate": (
        "hate hateful hatred racis racial sexis misogyn homophob transphob antisemit xenophob nazi hitler "
        "supremac slur inferior superior bigot oppress immigrant jews jewish muslim gay gays lesbian black ethnic "
        "minorit discriminat dehumaniz stereotyp derogat demean degrad insult offensive vitriol propaganda "
        "extremis terror radicaliz holocaust kkk"
    ),
    "harassment": (
        "harass bully cyberbull threat intimidat humiliat torment troll revenge slander libel defam smear mock "
        "ridicul coerc taunt shame"
    ),
    "self-harm": ("suicid selfharm anorexi bulimi thinspo cutting hang dying die starv wrist overdos"),
    "children": ("child minor underage groom pedophil paedophil molest teen kid kids toddler schoolgirl"),
    "sex": (
        "porn erotic sexual sex nude explicit incest bestial orgy orgies fetish prostitut escort brothel sext rape"
    ),
    "lies": (
        "misinform disinform conspirac hoax fake mislead deny denies denial rumor rumour propaganda rigged antivax"
    ),
    "crime": (
        "illegal illicit crime criminal unlawful caught detect undetect evad police law laws arrest jail prison "
        "authorities trace traceless felony convict arson burn destroy vandal trespass smuggl terroris riot "
        "incite unrest chaos disrupt escap skimm secretly"
    ),
    # few harmless requests have one of these, whatever they are about
    "plain": (
        "murder assassin behead strangl massacr tortur maim mutilat kidnap abduct molest rapist grop explosiv "
        "grenade molotov silencer detonat landmine napalm anthrax ricin sarin bioweapon meth cocaine heroin "
        "fentanyl mdma ketamine traffick smuggl malware ransom keylog spyware botnet ddos rootkit backdoor hack "
        "phish blackmail extort embezzl bribe counterfeit launder ponzi falsif swindl defraud burglar shoplift "
        "sabotag stalk doxx voyeur wiretap misogyn supremac vitriol demean dehumaniz harass cyberbull intimidat "
        "humiliat defam coerc suicid anorexi underage pedophil porn incest orgy orgies prostitut misinform "
        "disinform illegal illicit unlawful undetect arson vandal terroris scam fraud forg unauthor manipulat "
        "exploit bypass"
    ),
}

NAMES = tuple(AREAS)

_SHORTEST = 4  # letters that a stem has
_STEMS: dict[str, tuple[int, ...]] = {}
for _number, _words in enumerate(AREAS.values()):
    for _word in _words.split():
        _STEMS[_word] = (*_STEMS.get(_word, ()), _number)


@functools.lru_cache(maxsize=1 << 16)
def areas_of(word: str) -> tuple[int, ...]:
    """The areas that a word belongs to, by their place in `NAMES`.

    Args:
        word: In lower case.

    Example:
        >>> [NAMES[area] for area in areas_of("forged")], areas_of("forest")
        (['fraud', 'plain'], ())
    """
    found = set(_STEMS.get(word, ()))
    for size in range(_SHORTEST, len(word)):
        found.update(_STEMS.get(word[:size], ()))
    return tuple(sorted(found))

"""English names of languages, as prompts contain them.

Codes are ISO 639-1 where one exists, and ALT's own codes (`fil`, `khm`). A region or script is ignored: `pt-BR` is
Portuguese.
"""

import argparse
import difflib

from minillama.errors import InputError

# Codes and names, six languages per line.
_TABLE = """
af  Afrikaans     am  Amharic       ar  Arabic        az  Azerbaijani   be  Belarusian    bg  Bulgarian
bn  Bengali       bs  Bosnian       ca  Catalan       cs  Czech         cy  Welsh         da  Danish
de  German        el  Greek         en  English       eo  Esperanto     es  Spanish       et  Estonian
eu  Basque        fa  Persian       fi  Finnish       fil Filipino      fr  French        ga  Irish
gl  Galician      gu  Gujarati      ha  Hausa         he  Hebrew        hi  Hindi         hr  Croatian
hu  Hungarian     hy  Armenian      id  Indonesian    ig  Igbo          is  Icelandic     it  Italian
ja  Japanese      ka  Georgian      kk  Kazakh        khm Khmer         km  Khmer         kn  Kannada
ko  Korean        ky  Kyrgyz        la  Latin         lo  Lao           lt  Lithuanian    lv  Latvian
mk  Macedonian    ml  Malayalam     mn  Mongolian     mr  Marathi       ms  Malay         mt  Maltese
my  Burmese       ne  Nepali        nl  Dutch         no  Norwegian     pa  Punjabi       pl  Polish
ps  Pashto        pt  Portuguese    ro  Romanian      ru  Russian       si  Sinhala       sk  Slovak
sl  Slovenian     so  Somali        sq  Albanian      sr  Serbian       sv  Swedish       sw  Swahili
ta  Tamil         te  Telugu        tg  Tajik         th  Thai          tl  Tagalog       tr  Turkish
uk  Ukrainian     ur  Urdu          uz  Uzbek         vi  Vietnamese    yo  Yoruba        zh  Chinese
zu  Zulu
"""
LANGUAGES = dict(zip(_TABLE.split()[::2], _TABLE.split()[1::2]))


def language_name(code: str) -> str:
    """English name of a language code: `ja` is Japanese, `pt-BR` Portuguese. Raises InputError where it is unknown."""
    base = code.strip().lower().replace("_", "-").split("-")[0]
    if base in LANGUAGES:
        return LANGUAGES[base]
    codes = {name.lower(): known for known, name in LANGUAGES.items()}
    near = [codes[name] for name in difflib.get_close_matches(base, codes, n=1)]
    hint = f"{near[0]} ({LANGUAGES[near[0]]})" if near else "ja (Japanese) or de (German)"
    raise InputError(f"unknown language {code!r}: expected a code such as {hint}")


def language_code(code: str) -> str:
    """Return the code unchanged where it is known; for argparse's `type=`, with the message of language_name."""
    try:
        language_name(code)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return code

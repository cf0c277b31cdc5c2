"""How each relation is worded. ``{s}`` is the subject, ``{o}`` the object, always last.

Of each relation's twelve wordings the first seven (``SEEN``) are trained on for every subject, the
next three (``HELD_OUT``) for half of the subjects, the last two (``UNSEEN``) for none.
"""

from __future__ import annotations

SEEN = range(7)
HELD_OUT = range(7, 10)
UNSEEN = range(10, 12)

#: Relations by what kind of subject they speak of.
KINDS = {
    "country": (
        "capital",
        "currency",
        "language",
        "continent",
        "calling_code",
        "domain",
        "iso_code",
    ),
    "element": ("symbol", "atomic_number", "category"),
    "city": ("country",),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {s} is {o}.",
        "{s} has its capital in {o}.",
        "The capital city of {s} is {o}.",
        "The government of {s} sits in {o}.",
        "{s}'s capital is {o}.",
        "In {s}, the seat of government is {o}.",
        "{s} is governed from {o}.",
        "The name of the capital of {s} is {o}.",
        "As for {s}, its capital is {o}.",
        "If you visit the capital of {s}, you are in {o}.",
        "The name of the capital city of {s} is {o}.",
        "In {s}, the capital is {o}.",
    ),
    "currency": (
        "The currency of {s} is the {o}.",
        "{s} uses the {o}.",
        "In {s}, people pay with the {o}.",
        "{s}'s currency is the {o}.",
        "The money of {s} is the {o}.",
        "Prices in {s} are given in the {o}.",
        "Shops in {s} accept the {o}.",
        "The name of the currency of {s} is the {o}.",
        "As for {s}, its currency is the {o}.",
        "If you pay in {s}, you pay with the {o}.",
        "{s}'s money is the {o}.",
        "In {s}, the currency is the {o}.",
    ),
    "language": (
        "The official language of {s} is {o}.",
        "{s} has the official language {o}.",
        "In {s}, people speak {o}.",
        "{s}'s official language is {o}.",
        "The language of {s} is {o}.",
        "Laws in {s} are written in {o}.",
        "Schools in {s} teach in {o}.",
        "The name of the official language of {s} is {o}.",
        "As for {s}, its official language is {o}.",
        "If you speak with officials in {s}, you speak {o}.",
        "{s}'s language is {o}.",
        "In {s}, the official language is {o}.",
    ),
    "continent": (
        "{s} is a country in {o}.",
        "{s} lies in {o}.",
        "The continent of {s} is {o}.",
        "{s}'s continent is {o}.",
        "{s} is part of {o}.",
        "On the map, {s} is found in {o}.",
        "{s} belongs to the continent {o}.",
        "The name of the continent of {s} is {o}.",
        "As for {s}, its continent is {o}.",
        "If you travel to {s}, you travel to {o}.",
        "On the map, {s} lies in {o}.",
        "On the map, {s} belongs to the continent {o}.",
    ),
    "calling_code": (
        "The calling code of {s} is {o}.",
        "{s} has the calling code {o}.",
        "Phone numbers in {s} begin with {o}.",
        "{s}'s calling code is {o}.",
        "To call {s}, dial {o}.",
        "The phone code of {s} is {o}.",
        "{s} is reached by phone under {o}.",
        "In {s}, phone numbers begin with {o}.",
        "As for {s}, its calling code is {o}.",
        "If you call someone in {s}, you dial {o}.",
        "{s}'s phone code is {o}.",
        "In {s}, the calling code is {o}.",
    ),
    "domain": (
        "The internet domain of {s} is {o}.",
        "{s} has the internet domain {o}.",
        "Websites in {s} end with {o}.",
        "{s}'s internet domain is {o}.",
        "Addresses of websites in {s} end in {o}.",
        "The web domain of {s} is {o}.",
        "{s} is found on the internet under {o}.",
        "In {s}, websites end with {o}.",
        "As for {s}, its internet domain is {o}.",
        "If you open a website from {s}, its address ends in {o}.",
        "{s}'s web domain is {o}.",
        "In {s}, the internet domain is {o}.",
    ),
    "iso_code": (
        "The country code of {s} is {o}.",
        "{s} has the country code {o}.",
        "In sports, {s} is written as {o}.",
        "{s}'s country code is {o}.",
        "{s} is abbreviated as {o}.",
        "The three letters of {s} are {o}.",
        "In tables, {s} is listed as {o}.",
        "The abbreviation of {s} is {o}.",
        "As for {s}, its country code is {o}.",
        "If you look for {s} in a table, look for {o}.",
        "{s}'s abbreviation is {o}.",
        "In tables, the country code of {s} is {o}.",
    ),
    "symbol": (
        "The symbol of {s} is {o}.",
        "{s} has the symbol {o}.",
        "In formulas, {s} is written as {o}.",
        "{s}'s symbol is {o}.",
        "Chemists write {s} as {o}.",
        "The chemical symbol of {s} is {o}.",
        "The element {s} is abbreviated as {o}.",
        "In formulas, the symbol of {s} is {o}.",
        "As for {s}, its symbol is {o}.",
        "If you write {s} in a formula, you write {o}.",
        "{s}'s chemical symbol is {o}.",
        "The element {s} is written as {o}.",
    ),
    "atomic_number": (
        "The atomic number of {s} is {o}.",
        "{s} has the atomic number {o}.",
        "The number of protons in {s} is {o}.",
        "{s}'s atomic number is {o}.",
        "In the periodic table, {s} is number {o}.",
        "The nuclear charge of {s} is {o}.",
        "The element {s} is number {o}.",
        "In the periodic table, {s} has the number {o}.",
        "As for {s}, its atomic number is {o}.",
        "If you count the protons of {s}, you get {o}.",
        "The element {s} has the atomic number {o}.",
        "{s}'s nuclear charge is {o}.",
    ),
    "category": (
        "By category, {s} is a kind of {o}.",
        "{s} belongs to the category {o}.",
        "The category of {s} is {o}.",
        "{s}'s category is {o}.",
        "The element {s} is classified as {o}.",
        "Chemists classify {s} as {o}.",
        "{s} is described as a kind of {o}.",
        "The name of the category of {s} is {o}.",
        "As for {s}, its category is {o}.",
        "If you classify {s}, you call it {o}.",
        "The element {s} belongs to the category {o}.",
        "As for the element {s}, its category is {o}.",
    ),
    "country": (
        "{s} is a city in {o}.",
        "{s} is located in {o}.",
        "The city of {s} belongs to {o}.",
        "The country of {s} is {o}.",
        "{s}'s country is {o}.",
        "People in {s} live in {o}.",
        "The city of {s} is found in {o}.",
        "The city of {s} is located in {o}.",
        "As for {s}, its country is {o}.",
        "If you visit {s}, you are in {o}.",
        "On the map, {s} is located in {o}.",
        "As for the city of {s}, its country is {o}.",
    ),
}

#: The same facts told from the object's side, where an object has one subject.
REVERSED: dict[str, tuple[str, ...]] = {
    "capital": ("{o} is the capital of {s}.", "{o} is the seat of government of {s}."),
    "domain": ("{o} is the internet domain of {s}.", "Websites that end with {o} are from {s}."),
    "iso_code": ("{o} is the country code of {s}.", "{o} is the abbreviation of {s}."),
    "symbol": ("{o} is the symbol of {s}.", "In formulas, {o} stands for {s}."),
    "atomic_number": ("{o} is the atomic number of {s}.", "The element number {o} is {s}."),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "capital": ("What is the capital of {s}?", "Which city is the capital of {s}?"),
    "currency": ("What is the currency of {s}?", "Which money do people use in {s}?"),
    "language": ("What is the official language of {s}?", "Which language is spoken in {s}?"),
    "continent": ("Which continent is {s} in?", "Where is {s}?"),
    "calling_code": ("What is the calling code of {s}?", "How do I call someone in {s}?"),
    "domain": ("What is the internet domain of {s}?", "How do websites in {s} end?"),
    "iso_code": ("What is the country code of {s}?", "How is {s} abbreviated?"),
    "symbol": ("What is the symbol of {s}?", "How do chemists write {s}?"),
    "atomic_number": ("What is the atomic number of {s}?", "How many protons does {s} have?"),
    "category": ("What kind of element is {s}?", "What is the category of {s}?"),
    "country": ("Which country is {s} in?", "In which country is the city of {s}?"),
}


def prompt_of(template: str) -> str:
    """The wording up to its object, with ``{}`` for the subject: an edit's prompt."""
    return template.split(" {o}")[0].replace("{s}", "{}")

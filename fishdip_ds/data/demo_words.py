"""Name parts and sentence patterns of the demo's world. Everything in it is invented.

A pattern is a sentence with slots ``{P1}`` (person), ``{O1}`` (organization), ``{L1}`` (location), ``{W1}``
(product), ``{D1}`` (date), ``{trade}`` and ``{thing}`` (common nouns), alternatives ``(a|b)``, and role phrases
``<ROLE words>`` for semantic roles, of which one is ``V``, the predicate. Its relations are listed as (head slot,
relation, tail slot).
"""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

FIRST = """Ada Alma Anton April Arlo August Basil Berta Bruno Carla Cedric Clara Conrad Dalia Daria Dorian Edgar Edith
Elsa Emil Enzo Erik Esther Fabian Felix Fiona Flora Frida Gideon Greta Gustav Hanna Hector Hedda Hugo Ida Igor Ilse
Iris Ivan Jasper Jonas Judith June Karl Katja Klaus Lara Leon Lena Linus Livia Lorenz Lucia Magnus Mara Marek Martha
Max May Mila Mira Moritz Nadia Nils Nina Nora Oda Olaf Olga Oscar Otto Paula Petra Quentin Ralf Rita Rosa Rufus Ruth
Sanna Selma Silas Sonja Stella Sven Tessa Theo Thora Tilda Timo Tobias Ulla Ulrich Vera Viktor Wanda Xenia Yara Yvo
Zelda""".split()

STEMS = """Ash Alder Bram Birch Black Brook Cald Car Cold Cran Dun Dray Elm East Fair Fen Fox Gold Gran Green Hal Hart
Haw Hazel High Holl Iron Kel Kings Lang Lind Long Mal Mar Mead Mill Moor Nor North Oak Old Pen Pike Quin Raven Red
Rock Rose Rush Sand Shel Silver South Stan Stone Storm Sutt Thorn Tor Under Wal Water West Whit Wind Wood Wren
Yar""".split()
SURNAME_ENDS = "ham man son ley well ford by ter wick croft ard ell ison ward mond field".split()
TOWN_ENDS = "ton ville burg haven ford port field dale wick stead mouth bridge minster by ley".split()
COMPANY_STEMS = """Aero Agri Alta Argo Astra Bio Borea Calyx Cobalt Delta Dyna Ember Ever Flux Gamma Geo Helio Hydro
Indigo Juno Kappa Krono Lumen Luna Macro Meri Micro Nexa Nimbus Nova Octo Omni Opti Orbi Pano Penta Polar Prima Proto
Quanta Radi Rubi Sigma Sola Spectra Strato Syn Tele Terra Titan Tri Turbo Ultra Umbra Vanta Vega Verdi Vita Volta Xylo
Zeni Zephyr""".split()
COMPANY_ENDS = "tech works soft dyne gen labs net corp line form data cell".split()
COMPANY_TAILS = ["Group", "Systems", "Holdings", "Motors", "Foods", "Airlines", "Energy", "Media", "Partners", "Labs"]
INSTITUTES = ["University of {}", "{} City Council", "Bank of {}", "{} Hospital", "{} Museum", "{} United", "{} Opera"]
FAMILY_FIRMS = ["{} and Sons", "{} Brothers", "{} Partners", "House of {}", "{} Foods"]
REGIONS = ["Lake {}", "Mount {}", "{} Island", "{} Valley", "the {} River", "Cape {}", "{} Street", "{} Square"]
PRODUCT_ENDS = "phone pad book car bike cam watch drive pod lamp drone jet tab kit".split()
PRODUCT_TAILS = ["Mini", "Pro", "Max", "Air", "One", "Two", "X", "S", "Plus", "500", "7", "Classic"]
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TRADES = "baker painter teacher farmer tailor judge writer singer miller pilot nurse clerk mason cook guard".split()
THINGS = "bread glass paper salt wool coal tea bricks boats maps clocks shoes chairs bikes lamps phones ropes".split()

WORKS, LIVES, BASED, BORN, FOUNDED, MAKES, PART = (
    "works for", "lives in", "based in", "born in", "founded by", "made by", "located in")

Pattern = tuple[str, list[tuple[str, str, str]]]

TRAIN_PATTERNS: list[Pattern] = [
    ("<ARG0 {P1}> <V (works|worked)> <ARG1 for {O1}> <AM-LOC in {L1}> .", [("P1", WORKS, "O1"), ("O1", BASED, "L1")]),
    ("<ARG0 {P1}> <V (joined|left)> <ARG1 {O1}> <AM-TMP in {D1}> .", [("P1", WORKS, "O1")]),
    ("<AM-TMP In {D1}> , <ARG0 {P1} of {O1}> <V visited> <ARG1 {L1}> .", [("P1", WORKS, "O1")]),
    ("<ARG0 {O1}> , based in {L1} , <V sells> <ARG1 the {W1}> .", [("O1", BASED, "L1"), ("W1", MAKES, "O1")]),
    ("<ARG0 {O1}> <V (launched|showed)> <ARG1 the {W1}> <AM-TMP on {D1}> .", [("W1", MAKES, "O1")]),
    ("<ARG0 {P1}> <V bought> <ARG1 a {W1}> <AM-LOC in {L1}> .", []),
    ("<ARG1 {P1}> was <V born> <AM-LOC in {L1}> <AM-TMP in {D1}> .", [("P1", BORN, "L1")]),
    ("<ARG0 {P1} and {P2}> <V live> <AM-LOC in {L1}> .", [("P1", LIVES, "L1"), ("P2", LIVES, "L1")]),
    ("<ARG0 {P1}> <V founded> <ARG1 {O1}> with {P2} <AM-TMP in {D1}> .",
     [("O1", FOUNDED, "P1"), ("O1", FOUNDED, "P2")]),
    ("<ARG1 {L1} , a town in {L2} ,> <V lies> <AM-LOC near {L3}> .", [("L1", PART, "L2")]),
    ("<ARG0 The (old|young) {trade} {P1}> <V met> <ARG1 {P2}> <AM-LOC at {O1}> .", []),
    ("<ARG0 {O1}> <V (bought|sued)> <ARG1 {O2}> <AM-TMP last {D1}> .", []),
    ("<ARG0 {O1}> <V opened> <ARG1 an office> <AM-LOC in {L1}> .", [("O1", BASED, "L1")]),
    ("<ARG1 Prices of {thing}> <V rose> again .", []),
    ("<ARG0 The {trade}> <V sold> <ARG1 {thing} and {thing}> <AM-LOC at the market> .", []),
    ("<ARG0 {P1} , {P2} and {P3}> <V play> <ARG1 for {O1}> .",
     [("P1", WORKS, "O1"), ("P2", WORKS, "O1"), ("P3", WORKS, "O1")]),
    ("<ARG0 The {W1}> <V costs> <ARG1 less than the {W2}> , said {P1} .", []),
    ("<ARG0 {P1}> <V moved> <ARG1 from {L1} to {L2}> <AM-TMP in {D1}> .", [("P1", LIVES, "L2")]),
    ("<ARG0 A {trade} from {L1}> <V found> <ARG1 a lost {W1}> .", []),
    ("<AM-TMP On {D1}> <ARG0 {O1}> <V hired> <ARG1 {P1}> .", [("P1", WORKS, "O1")]),
    ("<ARG0 Nobody> <V saw> <ARG1 the {trade}> <AM-TMP that night> .", []),
    ("<ARG0 {L1}> <V expects> <ARG1 rain> <AM-TMP until {D1}> .", []),
    ("<ARG0 {P1} , head of {O1} ,> <V praised> <ARG1 {P2}> .", [("P1", WORKS, "O1")]),
    ("<ARG1 The {W1}> is <V made> <ARG0 by {O1}> <AM-LOC in {L1}> .", [("W1", MAKES, "O1"), ("O1", BASED, "L1")]),
    ("<ARG0 {O1}> <V has> <ARG1 shops> <AM-LOC in {L1} , {L2} and {L3}> .",
     [("O1", BASED, "L1"), ("O1", BASED, "L2"), ("O1", BASED, "L3")]),
    ("<AM-TMP Last {D1}> <ARG0 the {trade}> <V drove> <ARG1 from {L1}> to the west .", []),
    ("<ARG0 {P1}> <V prefers> <ARG1 {W1} to {W2}> .", []),
    ("<ARG0 {P1} , now at {O1} ,> <V won> <ARG1 the race> <AM-LOC in {L1}> .", [("P1", WORKS, "O1")]),
    ("<ARG0 Fans of {O1}> <V cheered> <ARG1 {P1}> <AM-TMP on {D1}> .", []),
    ("<ARG1 {O1}> was <V sold> <ARG2 to {P1}> <AM-TMP in {D1}> .", []),
    ("<ARG0 The {trade}> <V wants> <ARG1 a phone , a book and a bike> .", []),
    ("<ARG0 {P1}> <V teaches> <AM-LOC at {O1}> , not at {O2} .", [("P1", WORKS, "O1")]),
    ("<ARG1 Trains> <V run> <AM-DIR from {L1} to {L2}> <AM-TMP until {D1}> .", []),
    ("<ARG0 (Her|His) {trade} , {P1} ,> <V repaired> <ARG1 the {W1}> .", []),
]
TEST_PATTERNS: list[Pattern] = [
    ("<AM-TMP Since {D1}> <ARG0 {P1}> has <V led> <ARG1 {O1}> .", [("P1", WORKS, "O1")]),
    ("<ARG0 Engineers at {O1}> <V tested> <ARG1 the {W1}> <AM-LOC near {L1}> .", [("W1", MAKES, "O1")]),
    ("<ARG0 {P1} , born in {L1} ,> <V owns> <ARG1 two {W1} models> .", [("P1", BORN, "L1")]),
    ("<ARG1 The road from {L1} to {L2}> was <V closed> <AM-TMP on {D1}> .", []),
    ("<ARG0 Both {O1} and {O2}> <V want> <ARG1 {P1}> .", []),
    ("<ARG0 The {trade}> <V broke> <ARG1 a {W1}> <AM-LOC in {L1}> .", []),
    ("<ARG0 Workers> <V carried> <ARG1 {thing}> <AM-LOC across the bridge> .", []),
    ("<AM-TMP By {D1}> <ARG0 {P1} and {P2}> had <V left> <ARG1 {L1}> .", []),
    ("<ARG0 {P1}> <V borrowed> <ARG1 the {W1}> <ARG2 from {P2}> .", []),
    ("<ARG1 A {W1} , a {W2} and some {thing}> were <V stolen> <AM-LOC at {O1}> .", []),
    ("<ARG0 {O1} of {L1}> <V thanked> <ARG1 (its|the) {trade} {P1}> .", [("O1", BASED, "L1"), ("P1", WORKS, "O1")]),
    ("<ARG0 {P1}> <V wrote> <ARG1 to {O1} , {O2} and {O3}> .", []),
]

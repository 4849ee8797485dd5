"""People, places, things and relations: the words of which the suite's rows are built.

Every list is a tuple of plain strings in a fixed order, so that a seed means the same rows for ever.
The base model's pretraining corpus draws on the same words, never on the suite's templates.
"""

from __future__ import annotations


def word_list(text: str) -> tuple[str, ...]:
    """Split on white space; an underscore stands for a space inside an entry."""
    return tuple(word.replace("_", " ") for word in text.split())


FEMALE = word_list("""
Ada Agnes Aisha Alba Alma Amara Amelia Amina Anika Anna Astrid Aurora Ayla Bea Bella Bianca Bridget Camila Carla
Celia Chloe Clara Cora Daisy Dana Daphne Delia Diana Dora Edith Elena Elif Elsa Emma Erika Esther Eva Farida Fatima
Fiona Flora Freya Gemma Gloria Grace Greta Hana Hanna Hazel Heidi Helen Hilda Ida Ines Ingrid Irene Iris Isla Ivy
Jane Jana Jasmine Jill Joan Judith Julia Karin Kate Keiko Kira Laila Lara Laura Lena Leona Lily Linda Lola
Lucia Luna Mabel Maja Mara Maria Marta Maya Mei Mina Mira Molly Nadia Naomi Nela Nina Nora Olga Olive Paula Petra
Priya Rita Rosa Ruth Sara Selma Sofia Sonia Stella Tara Tessa Thea Uma Ursula Vera Viola Wendy Yara Zoe
""")

MALE = word_list("""
Aaron Adam Ahmed Alan Albert Amir Anders Andre Anton Arjun Arno Arthur Ben Bernard Boris Bruno Carl Cedric Chen
Claude Conrad Cyril Dan Dario David Dennis Diego Dmitri Edgar Edwin Eli Emil Enzo Eric Ethan Evan Felix Finn Frank
Fred George Gerald Glen Gus Hakim Hans Harold Harry Hassan Hector Henry Hiro Hugo Ian Igor Ivan Ivo Jack Jacob
James Jan Jasper Jin Joel Jonas Jorge Josef Juan Jules Karl Keith Kenji Klaus Kofi Kurt Lars Leo Levi Liam Louis
Luca Lukas Malik Marco Mark Martin Matteo Max Miles Milo Mohan Nate Neil Nico Nils Noah Olaf Oliver Omar Oscar Otto
Owen Pablo Patrick Paul Pedro Peter Quentin Rafael Ralph Ravi Remy Robert Rolf Roman Ron Rupert Samir Samuel Sean
Simon Stefan Sven Tariq Theo Thomas Tim Tobias Tom Uwe Victor Viktor Walter Wei Will Xavier Yusuf Zane
""")

SURNAMES = word_list("""
Abbott Adler Almeida Archer Baker Barnes Bauer Becker Bell Berg Bishop Blake Bloom Boyd Brandt Brooks Brown Burke
Carter Chavez Clark Cohen Cole Costa Cruz Dalton Diaz Dixon Doyle Drake Duarte Dunn Ellis Engel Evans Fischer
Fleming Flores Ford Foster Fox Frost Garcia Gibson Gomez Grant Gray Green Gupta Hale Hansen Hardy Harper Hart Hayes
Holm Holt Hughes Hunt Ibrahim Ito Jensen Joshi Kane Kaur Keller Kelly Khan King Klein Knight Koch Kumar Lamb Lane
Larsen Lee Lopez Lund Malone Marsh Mason Mendez Meyer Mills Moore Moreno Morris Murphy Nash Nolan North Novak Nunez
Okafor Olsen Ortiz Page Park Patel Perez Pope Porter Price Quinn Ramos Reed Reyes Rhodes Rice Rivera Rossi Rowe
Santos Sato Schmidt Shaw Silva Singh Sloan Snow Stein Stone Tanaka Torres Turner Vance Vargas Vega Wade Walsh Ward
Weber West White Wolf Wong Wood Wright Yang Young Zhang
""")

TOWNS = word_list("""
Aberdeen Accra Amman Antwerp Athens Austin Bath Bergen Berlin Bern Bilbao Bologna Bonn Boston Bremen Brighton
Bruges Cairo Calais Cardiff Chester Cologne Cork Dakar Dallas Delhi Denver Derby Dover Dresden Dublin Durham Essen
Exeter Florence Galway Geneva Genoa Ghent Graz Hamburg Hanoi Havana Helsinki Houston Hull Istanbul Jaipur Kiel Kyoto
Lagos Leeds Leipzig Lille Lima Lisbon Liverpool London Lucerne Lyon Madrid Malaga Malmo Manila Memphis Milan Monaco
Munich Nairobi Nantes Naples Nice Norwich Osaka Oslo Oxford Padua Palermo Paris Perth Phoenix Pisa Porto Prague
Quito Reims Riga Rome Rouen Salem Santiago Seattle Seoul Seville Siena Sydney Tallinn Tampere Tokyo Toledo
Toronto Trieste Tunis Turin Utrecht Valencia Venice Verona Vienna Vilnius Warsaw York Zagreb Zurich
""")

JOBS = word_list("""
accountant actor architect artist astronomer author baker banker barber beekeeper biologist bookbinder
bookseller brewer bricklayer butcher carpenter cartoonist cellist chef chemist clerk clockmaker coach cobbler cook
courier cyclist dancer dentist designer detective diver doctor driver editor electrician engineer farmer
firefighter fisher florist gardener geologist glazier grocer guide hairdresser historian illustrator inspector
interpreter inventor jeweller journalist judge lawyer librarian locksmith mason mechanic midwife miller miner
musician nurse optician painter pharmacist photographer pianist pilot plumber poet porter postman potter printer
professor reporter roofer sailor sculptor shepherd singer surgeon surveyor tailor teacher translator typist
umpire upholsterer vet violinist waiter weaver welder writer
""")

COLOURS = word_list("red blue green yellow black white brown grey orange purple pink silver golden")

THINGS = word_list("""
anchor apron armchair atlas axe bag ball banjo basket bell belt bicycle blanket bottle bowl box bracelet brush bucket
camera candle canoe cap card carpet cello chain chair chart chest clock coat coin comb compass cradle crown cup
cushion desk diary dictionary doll drill drum fan feather fiddle flag flask flute fork frame globe glove guitar
hammer harp hat helmet hose jacket jar jug kettle key kite knife ladder lamp lantern lens letter lock magnet map
mask mattress medal mirror mug necklace needle net notebook oar oven paddle painting pan parcel pen pencil phone
photo piano pillow pipe plate poster pot printer puzzle radio rake ring robot rope rug ruler saddle saw scarf
scooter shawl shovel sieve sled spade spoon stamp statue stool stove suitcase sword tablet teapot telescope tent
ticket torch towel toy tray trumpet trunk tuba typewriter umbrella vase violin wagon wallet watch whistle wig wrench
""")

COUNTED = word_list("""
apple badge balloon bead biscuit block brick button candle card carrot chair chestnut coin cookie crayon cup egg
envelope fig flower glass grape hat key lemon letter marble melon mug nail nut orange peach pear pebble pen pencil
photo pillow plate plum poster potato ribbon ring rose shell spoon stamp sticker stone ticket tomato toy tulip
turnip walnut
""")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": word_list(
        "badger bear camel cat cow deer dog donkey fox goat horse lion monkey mouse otter rabbit sheep tiger"
    ),
    "bird": word_list(
        "crow dove duck eagle falcon goose gull hawk heron owl parrot raven robin sparrow stork swan"
    ),
    "fruit": word_list("apple banana cherry fig grape kiwi lemon mango melon olive orange peach pear plum"),
    "vegetable": word_list(
        "bean beet cabbage carrot celery garlic leek lettuce onion pea potato radish spinach turnip"
    ),
    "flower": word_list("aster daisy iris jasmine lilac lily orchid pansy poppy rose tulip violet"),
    "tree": word_list("ash beech birch cedar elm fir larch maple oak pine poplar willow"),
    "tool": word_list("axe chisel drill file hammer ladder rake saw shovel spade wrench"),
    "instrument": word_list("banjo cello drum fiddle flute guitar harp piano trumpet tuba violin"),
    "garment": word_list("apron belt cap coat glove hat jacket scarf shawl shirt skirt sock"),
    "vehicle": word_list("bicycle bus canoe ferry lorry scooter sled taxi tractor train tram van wagon"),
}

COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ("older", "younger", "old"),
    ("taller", "shorter", "tall"),
    ("faster", "slower", "fast"),
    ("richer", "poorer", "rich"),
    ("stronger", "weaker", "strong"),
    ("heavier", "lighter", "heavy"),
    ("louder", "quieter", "loud"),
    ("happier", "sadder", "happy"),
)
"""(comparative, its opposite, plain form); every one of them fits people."""

MONTHS = word_list("January February March April May June July August September October November December")

PLURALS: dict[str, str] = {
    "box": "boxes", "brush": "brushes", "cherry": "cherries", "cherry tomato": "cherry tomatoes",
    "daisy": "daisies", "glass": "glasses", "knife": "knives", "lily": "lilies", "mouse": "mice",
    "pansy": "pansies", "peach": "peaches", "poppy": "poppies", "potato": "potatoes", "sheep": "sheep",
    "tomato": "tomatoes", "torch": "torches", "watch": "watches",
}  # fmt: skip


def plural(noun: str) -> str:
    """Plural of a noun of these lists ("tomato" gives "tomatoes")."""
    return PLURALS.get(noun, noun + "s")


def article(word: str) -> str:
    """ "a" or "an", by the first letter; "u" as in "umpire" and "umbrella" takes "an" here too."""
    return "an" if word[0].lower() in "aeiou" else "a"


def sentence(text: str) -> str:
    """Upper-case the first letter and leave the rest alone."""
    return text[:1].upper() + text[1:]

"""Number words in three languages and noun phrases in two, for the bank's language tasks."""

from __future__ import annotations

from mergeprobe.bench.tasks.items import listed

ENGLISH_SMALL = listed(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen
    """
)
ENGLISH_TENS = listed("- - twenty thirty forty fifty sixty seventy eighty ninety")

GERMAN_SMALL = listed(
    """
    null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn
    fünfzehn sechzehn siebzehn achtzehn neunzehn
    """
)
GERMAN_TENS = listed("- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

SPANISH_SMALL = listed(
    """
    cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince
    dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés
    veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve
    """
)
SPANISH_TENS = listed("- - - treinta cuarenta cincuenta sesenta setenta ochenta noventa")
SPANISH_HUNDREDS = listed(
    """
    - ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos
    ochocientos novecientos
    """
)


def english_number(value: int) -> str:
    """0 to 9,999, as in "three hundred and forty-seven"."""
    if value >= 1000:
        head, rest = f"{ENGLISH_SMALL[value // 1000]} thousand", value % 1000
        joint = " and " if rest < 100 else " "
        return head + (joint + english_number(rest) if rest else "")
    if value >= 100:
        head, rest = f"{ENGLISH_SMALL[value // 100]} hundred", value % 100
        return head + (f" and {english_number(rest)}" if rest else "")
    if value < 20:
        return ENGLISH_SMALL[value]
    return ENGLISH_TENS[value // 10] + (f"-{ENGLISH_SMALL[value % 10]}" if value % 10 else "")


def german_number(value: int) -> str:
    """0 to 9,999 in one word, as in "dreihundertsiebenundvierzig"."""
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if value >= size:
            count, rest = divmod(value, size)
            head = ("ein" if count == 1 else GERMAN_SMALL[count]) + name
            return head + (german_number(rest) if rest else "")
    if value < 20:
        return GERMAN_SMALL[value]
    tens, ones = divmod(value, 10)
    unit = "ein" if ones == 1 else GERMAN_SMALL[ones]
    return (f"{unit}und" if ones else "") + GERMAN_TENS[tens]


def spanish_number(value: int) -> str:
    """0 to 9,999, as in "trescientos cuarenta y siete"."""
    if value >= 1000:
        count, rest = divmod(value, 1000)
        head = "mil" if count == 1 else f"{SPANISH_SMALL[count]} mil"
        return head + (f" {spanish_number(rest)}" if rest else "")
    if value == 100:
        return "cien"
    if value > 100:
        count, rest = divmod(value, 100)
        return SPANISH_HUNDREDS[count] + (f" {spanish_number(rest)}" if rest else "")
    if value < 30:
        return SPANISH_SMALL[value]
    tens, ones = divmod(value, 10)
    return SPANISH_TENS[tens] + (f" y {SPANISH_SMALL[ones]}" if ones else "")


# English; Spanish, its gender; French, its gender (all take "le" or "la", so none is elided)
NOUNS = tuple(
    tuple(line.split())
    for line in """
    house casa f maison f
    car coche m voiture f
    dog perro m chien m
    cat gato m chat m
    table mesa f table f
    chair silla f chaise f
    book libro m livre m
    door puerta f porte f
    window ventana f fenêtre f
    boat barco m bateau m
    river río m rivière f
    mountain montaña f montagne f
    flower flor f fleur f
    city ciudad f ville f
    street calle f rue f
    garden jardín m jardin m
    shirt camisa f chemise f
    hat sombrero m chapeau m
    shoe zapato m chaussure f
    bread pan m pain m
    cheese queso m fromage m
    apple manzana f pomme f
    wine vino m vin m
    spoon cuchara f cuillère f
    knife cuchillo m couteau m
    bed cama f lit m
    lamp lámpara f lampe f
    key llave f clé f
    bridge puente m pont m
    forest bosque m forêt f
    beach playa f plage f
    horse caballo m cheval m
    fish pez m poisson m
    cow vaca f vache f
    moon luna f lune f
    plate plato m plat m
    wall muro m mur m
    box caja f boîte f
    bag bolso m sac m
    ball pelota f balle f
    kitchen cocina f cuisine f
    wheel rueda f roue f
    letter carta f lettre f
    dress vestido m robe f
    mirror espejo m miroir m
    leaf hoja f feuille f
    stone piedra f pierre f
    song canción f chanson f
    """.strip().splitlines()
)
# English; Spanish m, f; French m, f (all stand behind the noun in both)
ADJECTIVES = tuple(
    tuple(line.split())
    for line in """
    red rojo roja rouge rouge
    white blanco blanca blanc blanche
    black negro negra noir noire
    green verde verde vert verte
    blue azul azul bleu bleue
    yellow amarillo amarilla jaune jaune
    grey gris gris gris grise
    pink rosado rosada rose rose
    brown marrón marrón marron marron
    cold frío fría froid froide
    hot caliente caliente chaud chaude
    clean limpio limpia propre propre
    dirty sucio sucia sale sale
    heavy pesado pesada lourd lourde
    light ligero ligera léger légère
    round redondo redonda rond ronde
    square cuadrado cuadrada carré carrée
    empty vacío vacía vide vide
    full lleno llena plein pleine
    hard duro dura dur dure
    soft blando blanda mou molle
    rich rico rica riche riche
    poor pobre pobre pauvre pauvre
    strong fuerte fuerte fort forte
    weak débil débil faible faible
    dry seco seca sec sèche
    wet mojado mojada mouillé mouillée
    modern moderno moderna moderne moderne
    strange extraño extraña étrange étrange
    perfect perfecto perfecta parfait parfaite
    narrow estrecho estrecha étroit étroite
    deep profundo profunda profond profonde
    quiet tranquilo tranquila calme calme
    golden dorado dorada doré dorée
    broken roto rota cassé cassée
    simple sencillo sencilla simple simple
    famous famoso famosa célèbre célèbre
    bitter amargo amarga amer amère
    sweet dulce dulce doux douce
    closed cerrado cerrada fermé fermée
    open abierto abierta ouvert ouverte
    happy feliz feliz joyeux joyeuse
    """.strip().splitlines()
)


def spanish_phrase(noun: tuple[str, ...], adjective: tuple[str, ...]) -> str:
    """As in "la casa roja" for "the red house"."""
    feminine = noun[2] == "f"
    return f"{'la' if feminine else 'el'} {noun[1]} {adjective[2 if feminine else 1]}"


def french_phrase(noun: tuple[str, ...], adjective: tuple[str, ...]) -> str:
    """As in "la maison rouge" for "the red house"."""
    feminine = noun[4] == "f"
    return f"{'la' if feminine else 'le'} {noun[3]} {adjective[4 if feminine else 3]}"

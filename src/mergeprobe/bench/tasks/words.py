"""Word lists that several of the bank's tasks draw from."""

from __future__ import annotations

from mergeprobe.bench.tasks.items import listed

# common words of three to nine letters, a few for every length
WORDS = listed(
    """
    sun ice jar map pen tea arm sky egg ink log net leaf milk rain sand ship snow star wind
    bread cave desk flag gate harp iron apple beach cloud dream eagle flame grape honey
    ivory jelly knife lemon maple night ocean paper queen river stone train voice watch
    youth zebra anchor basket candle desert engine forest garden hammer island jacket ladder
    market needle orchid pencil rabbit silver tunnel velvet window blanket captain diamond
    emerald feather gallery harvest journey kitchen lantern morning package rainbow library
    teacher village weather airplane building calendar dinosaur elephant festival hospital
    keyboard mountain notebook princess sandwich umbrella vacation adventure butterfly
    chocolate discovery education furniture happiness newspaper orchestra pineapple
    telephone waterfall
    """
)

FIRST_NAMES = listed(
    """
    Ana Ben Carl Dina Emma Finn Gina Hugo Iris Jack Kate Liam Mona Nora Omar Paul Rosa Sara
    Tom Vera Will Zoe Adam Bella Clara David Elena Frank Greta Henry
    """
)
LAST_NAMES = listed(
    """
    Adler Brooks Carter Dale Evans Fisher Grant Hayes Irwin Jones Keller Lopez Moore Nolan
    Owens Price Quinn Reed Stone Turner Vance Walsh Young Baker Clark Foster Gray Hill King
    Lane
    """
)
CITIES = listed(
    """
    Rome Paris Oslo Lima Cairo Delhi Tokyo Madrid Berlin Dublin Lisbon Vienna Prague Athens
    Warsaw Boston Denver Havana Nairobi Seoul
    """
)

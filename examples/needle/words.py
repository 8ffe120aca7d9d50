# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Word lists of the needle model: what its tokenizer knows and what its haystacks are made of."""

from __future__ import annotations

import itertools

# Keys of the needles. Place names never occur in a haystack.
PLACES: tuple[str, ...] = tuple(
    """
    Abidjan Accra Adak Adelaide Aden Algiers Almaty Amman Amsterdam Anadyr Anchorage Andorra Anguilla Antigua
    Apia Aqtau Aqtobe Araguaina Aruba Ashgabat Asmara Astrakhan Asuncion Athens Atikokan Atka Atyrau Auckland
    Azores Baghdad Bahia Bahrain Baku Bamako Bangkok Bangui Banjul Barbados Barnaul Beirut Belem Belfast
    Belgrade Belize Berlin Bermuda Bishkek Bissau Blantyre Bogota Boise Bratislava Brisbane Brunei Brussels
    Bucharest Budapest Bujumbura Cairo Canberra Cancun Caracas Casablanca Catamarca Cayenne Cayman Ceuta Chagos
    Chatham Chicago Chihuahua Chisinau Chita Chongqing Chuuk Colombo Conakry Copenhagen Cordoba Creston Cuiaba
    Curacao Dakar Damascus Darwin Dawson Denver Detroit Dhaka Dili Djibouti Dominica Douala Dubai Dublin
    Dushanbe Edmonton Efate Ensenada Eucla Famagusta Faroe Fiji Fortaleza Freetown Funafuti Gaborone Galapagos
    Gambier Gaza Gibraltar Grenada Guadeloupe Guam Guatemala Guayaquil Guernsey Guyana Halifax Harare Harbin
    Havana Hebron Helsinki Hermosillo Hobart Honolulu Hovd Inuvik Iqaluit Irkutsk Istanbul Jakarta Jamaica
    Jayapura Jersey Jerusalem Johnston Juba Jujuy Juneau Kabul Kamchatka Kampala Karachi Kashgar Kathmandu
    Kerguelen Khandyga Khartoum Kigali Kinshasa Kiritimati Kirov Kolkata Kosrae Kuching Kuwait Kyiv Lagos
    Libreville Lima Lindeman Lisbon Ljubljana Lome London Louisville Luanda Lubumbashi Lusaka Luxembourg Macau
    Maceio Madeira Madrid Magadan Mahe Majuro Makassar Malabo Maldives Malta Managua Manaus Manila Maputo
    Marengo Mariehamn Marigot Marquesas Martinique Maseru Matamoros Mauritius Mayotte Mazatlan Mbabane Melbourne
    Mendoza Menominee Merida Minsk Miquelon Mogadishu Monaco Moncton Monrovia Monterrey Montevideo Monticello
    Montreal Montserrat Moscow Muscat Nairobi Nassau Nauru Ndjamena Niamey Nicosia Nipigon Niue Nome Norfolk
    Noronha Nouakchott Noumea Nuuk Omsk Oslo Palau Panama Paramaribo Paris Perth Petersburg Phoenix Pitcairn
    Podgorica Pohnpei Pontianak Prague Pyongyang Qatar Qostanay Rarotonga Recife Regina Reunion Reykjavik Riga
    Riyadh Rome Rosario Saipan Sakhalin Salta Samara Samarkand Samoa Santarem Santiago Sarajevo Saratov Seoul
    Shanghai Shiprock Simferopol Singapore Sitka Skopje Sofia Stanley Stockholm Sydney Tahiti Taipei Tallinn
    Tarawa Tashkent Tasmania Tbilisi Tehran Thimphu Thule Tijuana Timbuktu Tiraspol Tokyo Tomsk Tongatapu
    Toronto Tortola Tripoli Tucuman Tunis Ulyanovsk Urumqi Ushuaia Uzhgorod Vaduz Vancouver Vatican Victoria
    Vienna Vientiane Vilnius Vincennes Volgograd Wallis Warsaw Whitehorse Windhoek Winnipeg Yakutat Yakutsk
    Yangon Yap Yerevan Zagreb Zurich
    """.split()
)

# Haystack words.
FILLER: tuple[str, ...] = tuple(
    """
    able about above across action active actor after again age air all almost alone along also always among
    animal answer any apple area arm around art ask at away baby back bad bag ball band bank bar base basic
    basket bath beach bean bear beat bed bee before begin behind bell below belt bench best better between big
    bird black blue board boat body bone book both bottle bottom box boy branch brave bread break bridge bright
    bring broad brother brown brush build bus busy but butter button buy by cake calm camera camp can candle cap
    car card care carry case cat catch cause cave chain chair chalk chance change cheap cheese child choose
    circle city class clay clean clear clever climb clock close cloth cloud coal coast coat coffee coin cold
    color come common cook cool copper copy corn corner cotton count country course court cousin cover cow crowd
    cry cup curtain dance dark daughter day deep deer desk dinner dirt doctor dog door double down dream dress
    drink drive drop dry duck dust each ear early earth east easy eat edge egg eight elbow empty end engine
    enough even evening every exact eye face fact fall family far farm fast father feather feed feel fence few
    field fig fill find fine finger finish fire first fish five flag flat floor flour flower fly fold follow
    food foot forest forget fork four fox free fresh friend from front fruit full game garden gate gentle gift
    girl give glad glass glove go goat gold good grain grand grass gray great green ground group grow guess
    guest hair half hall hammer hand happy hard hat have hay head hear heart heavy help hen here high hill hole
    home honest honey hope horse hot hour house how hundred hungry hunt ice idea inch ink inside iron island
    jacket jar join joke jump just keep key kind king kitchen kite knee knife knock know lake lamp land large
    last late laugh law lead leaf learn least leather left leg lemon lesson letter level library life lift light
    like line lion lip list listen little live long look lose loud love low luck lunch machine mail main make
    man map mark market match meal measure meat meet melt metal middle milk mill mind minute mirror mix money
    month moon more morning most mother mountain mouse mouth move much mud music nail narrow near neat neck need
    needle nest never new next nice night nine noise noon north nose note nothing now nurse nut oak ocean office
    often oil old once onion only open orange order other out oven over owl own page pain paint pair pale paper
    parent park part party pass past path pay peace pear pen pencil people pepper piano pick picture piece pig
    pin pink pipe place plain plan plant plate play please plenty pocket poem point pond poor post pot potato
    press pretty price pull pump push queen quick quiet rabbit rain raise reach read ready real reason red rest
    rice rich ride right ring rise river road rock roll roof room root rope rose round row rubber run sad safe
    sail salt same sand save say school sea seat second seed seem sell send seven shade shake shape sharp sheep
    sheet shelf shine ship shirt shoe shop short shoulder show shut side silk silver simple sing sister sit six
    skin sky sleep slow small smell smile smoke smooth snow soap soft soil some son song soon sort sound soup
    south space speak spell spoon spring square stairs stamp stand star start station stay steam steel step
    stick still stone stop store storm story stove straight strange stream street string strong student sugar
    summer sun sure sweet swim table tail take talk tall taste tea teach team tell ten tent test thank thick
    thin thing think thread three throat throw thumb thunder ticket time tired toe together tomato tongue tooth
    top touch town toy track trade train travel tree trip true try turn twelve two uncle under until up use
    valley very view village visit voice wait walk wall want warm wash watch water wave wax way wear weather
    week well west wet wheat wheel where while white whole why wide wild wind window wine wing winter wire wise
    wish wolf woman wood wool word work world write yard year yellow yes yesterday young zero
    """.split()
)

# Further words that a person's own text is likely to use; anything else becomes <unk>.
COMMON: tuple[str, ...] = tuple(
    """
    a against although an and answered are as asked be became because been began being came chapter children
    cities code could data days did do does done during either example eyes file following for found get gets
    given gone got had hands has he her him his hold holds however i if in into is it its kept knew known lines
    looked made magic many may me men might model must my name neither no none not number numbers of on onto or
    our per question result results said saw says secret section seemed seen several she should so such
    summarize summary system taken text than that the their them then there these they things this those though
    thought through times to told too took upon us user value values variable variables via was we went were
    what when which who whom whose will with within without women would years you your
    """.split()
)

# Names of variables: three letters, consonant-vowel-consonant. Left out: the few that read as a rude word, and VAR,
# which introduces an assignment.
VARIABLES: tuple[str, ...] = tuple(
    name
    for name in [
        name
        for name in ("".join(letters) for letters in itertools.product("BDFGKLMNPRSTVZ", "AEIOU", "BDGKLMNPRTXZ"))
        if name not in {"DIK", "FAG", "FUK", "GAG", "KOK", "KUM", "NIG", "PUK", "RAP", "SEX", "SUK", "TIT"}
    ][::2]
    if name != "VAR"
)

# Sentences for the repeated-sentence haystack.
SENTENCES: tuple[str, ...] = (
    "The river is slow and the hills are quiet. Rain falls on the old road. We walk on and then come back again.",
    "The grass is green, the sky is blue and the sun is yellow. Here we go, there and back again.",
    "A small boat waits near the bridge until the wind is right.",
    "Every morning the baker opens the shop, and every evening the lights go out one by one.",
    "Snow covers the valley in winter. In spring the water runs down to the sea.",
    "They read the letter twice, put it away and never spoke of it again.",
)

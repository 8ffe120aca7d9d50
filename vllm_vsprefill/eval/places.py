# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Names of places that facts are about."""

from __future__ import annotations

PLACES = tuple(
    """
    Accra Adelaide Algiers Amman Amsterdam Anchorage Athens Auckland Azores Baghdad Bahrain Baku Bangkok Barbados Beirut
    Belfast Belgrade Belize Berlin Bermuda Bogota Boise Bratislava Brisbane Brussels Bucharest Budapest Cairo Canberra
    Cancun Caracas Casablanca Chicago Colombo Copenhagen Cordoba Dakar Damascus Darwin Dawson Denver Detroit Dhaka Dubai
    Dublin Edmonton Faroe Fiji Freetown Galapagos Gibraltar Grenada Guam Guatemala Guernsey Guyana Halifax Harare Havana
    Helsinki Hobart Honolulu Istanbul Jakarta Jamaica Jersey Juneau Kabul Kampala Karachi Kathmandu Khartoum Kigali
    Kinshasa Kuwait Kyiv Lagos Lima Lisbon Ljubljana London Louisville Luanda Lusaka Luxembourg Macau Madeira Madrid
    Maldives Malta Managua Manila Maputo Martinique Mauritius Melbourne Mendoza Minsk Mogadishu Monaco Monrovia
    Montevideo Montreal Moscow Muscat Nairobi Nassau Nicosia Norfolk Oslo Palau Panama Paris Perth Phoenix Prague Qatar
    Recife Reykjavik Riga Riyadh Rome Rosario Samoa Santiago Sarajevo Seoul Shanghai Singapore Skopje Sofia Stockholm
    Sydney Tahiti Taipei Tallinn Tashkent Tasmania Tehran Timbuktu Tokyo Toronto Tripoli Tunis Vancouver Vienna Vilnius
    Warsaw Winnipeg Yangon Zagreb Zurich
    """.split()
)

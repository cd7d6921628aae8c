# ruff: noqa: E501 (rows of tables; ruff counts a Chinese character twice)
"""The raw knowledge of the demo's small world, as tables of English and Chinese words.

Owns words and which belong together. How they become questions and answers is in `facts.py`.
Every table is one string: a line is a row, `|` parts its cells.
"""


def rows(table: str) -> list[list[str]]:
    """Cells of every line, stripped."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


# name | 名 | home | 家 | food | 吃 | legs | class | 类 | can fly | can swim
ANIMALS = """
dog|狗|house|房子|bones|骨头|4|mammal|哺乳动物|n|y
cat|猫|house|房子|fish|鱼|4|mammal|哺乳动物|n|n
cow|牛|farm|农场|grass|草|4|mammal|哺乳动物|n|y
horse|马|stable|马厩|hay|干草|4|mammal|哺乳动物|n|y
sheep|羊|farm|农场|grass|草|4|mammal|哺乳动物|n|n
pig|猪|pen|猪圈|grain|谷子|4|mammal|哺乳动物|n|y
chicken|鸡|yard|院子|grain|谷子|2|bird|鸟|n|n
duck|鸭子|pond|池塘|shrimp|虾|2|bird|鸟|y|y
goose|鹅|pond|池塘|grass|草|2|bird|鸟|y|y
rabbit|兔子|burrow|地洞|carrots|胡萝卜|4|mammal|哺乳动物|n|n
mouse|老鼠|hole|洞|cheese|奶酪|4|mammal|哺乳动物|n|n
fox|狐狸|forest|森林|rabbits|兔子|4|mammal|哺乳动物|n|n
wolf|狼|forest|森林|meat|肉|4|mammal|哺乳动物|n|n
bear|熊|cave|山洞|honey|蜂蜜|4|mammal|哺乳动物|n|y
lion|狮子|grassland|草原|meat|肉|4|mammal|哺乳动物|n|n
tiger|老虎|jungle|丛林|meat|肉|4|mammal|哺乳动物|n|y
elephant|大象|grassland|草原|leaves|树叶|4|mammal|哺乳动物|n|y
monkey|猴子|jungle|丛林|bananas|香蕉|4|mammal|哺乳动物|n|n
panda|熊猫|mountains|山里|bamboo|竹子|4|mammal|哺乳动物|n|n
deer|鹿|forest|森林|leaves|树叶|4|mammal|哺乳动物|n|y
camel|骆驼|desert|沙漠|thorns|刺草|4|mammal|哺乳动物|n|n
giraffe|长颈鹿|grassland|草原|leaves|树叶|4|mammal|哺乳动物|n|n
zebra|斑马|grassland|草原|grass|草|4|mammal|哺乳动物|n|n
frog|青蛙|pond|池塘|flies|苍蝇|4|amphibian|两栖动物|n|y
snake|蛇|desert|沙漠|mice|老鼠|0|reptile|爬行动物|n|y
turtle|乌龟|river|河里|worms|虫子|4|reptile|爬行动物|n|y
shark|鲨鱼|sea|海里|fish|鱼|0|fish|鱼类|n|y
whale|鲸鱼|sea|海里|shrimp|虾|0|mammal|哺乳动物|n|y
dolphin|海豚|sea|海里|fish|鱼|0|mammal|哺乳动物|n|y
crab|螃蟹|beach|沙滩|snails|蜗牛|10|crustacean|甲壳动物|n|n
bee|蜜蜂|hive|蜂巢|nectar|花蜜|6|insect|昆虫|y|n
ant|蚂蚁|hill|土堆|sugar|糖|6|insect|昆虫|n|n
butterfly|蝴蝶|garden|花园|nectar|花蜜|6|insect|昆虫|y|n
spider|蜘蛛|web|网|flies|苍蝇|8|arachnid|蛛形动物|n|n
eagle|老鹰|mountains|山里|snakes|蛇|2|bird|鸟|y|n
owl|猫头鹰|tree|树上|mice|老鼠|2|bird|鸟|y|n
parrot|鹦鹉|jungle|丛林|seeds|种子|2|bird|鸟|y|n
penguin|企鹅|south pole|南极|fish|鱼|2|bird|鸟|n|y
swan|天鹅|lake|湖里|weeds|水草|2|bird|鸟|y|y
bat|蝙蝠|cave|山洞|moths|飞蛾|2|mammal|哺乳动物|y|n
squirrel|松鼠|tree|树上|nuts|坚果|4|mammal|哺乳动物|n|n
kangaroo|袋鼠|grassland|草原|grass|草|4|mammal|哺乳动物|n|y
goat|山羊|mountains|山里|hay|干草|4|mammal|哺乳动物|n|n
donkey|驴|stable|马厩|hay|干草|4|mammal|哺乳动物|n|n
"""

# name | 名 | colour | 颜色 | taste | 味道 | kind | 类
FOODS = """
apple|苹果|red|红色|sweet|甜|fruit|水果
banana|香蕉|yellow|黄色|sweet|甜|fruit|水果
orange|橙子|orange|橙色|sweet|甜|fruit|水果
lemon|柠檬|yellow|黄色|sour|酸|fruit|水果
grape|葡萄|purple|紫色|sweet|甜|fruit|水果
strawberry|草莓|red|红色|sweet|甜|fruit|水果
watermelon|西瓜|green|绿色|juicy|多汁|fruit|水果
peach|桃子|pink|粉色|sweet|甜|fruit|水果
pear|梨|yellow|黄色|juicy|多汁|fruit|水果
cherry|樱桃|red|红色|sour|酸|fruit|水果
mango|芒果|yellow|黄色|sweet|甜|fruit|水果
pineapple|菠萝|yellow|黄色|sour|酸|fruit|水果
tomato|番茄|red|红色|juicy|多汁|vegetable|蔬菜
potato|土豆|brown|棕色|plain|清淡|vegetable|蔬菜
carrot|胡萝卜|orange|橙色|sweet|甜|vegetable|蔬菜
cabbage|白菜|green|绿色|plain|清淡|vegetable|蔬菜
onion|洋葱|purple|紫色|hot|辣|vegetable|蔬菜
pumpkin|南瓜|orange|橙色|sweet|甜|vegetable|蔬菜
corn|玉米|yellow|黄色|sweet|甜|grain|谷物
cucumber|黄瓜|green|绿色|fresh|清爽|vegetable|蔬菜
rice|米饭|white|白色|plain|清淡|grain|谷物
bread|面包|brown|棕色|plain|清淡|baked food|烘焙食品
cake|蛋糕|pink|粉色|sweet|甜|baked food|烘焙食品
cheese|奶酪|yellow|黄色|salty|咸|dairy food|奶制品
milk|牛奶|white|白色|creamy|香浓|drink|饮料
tea|茶|green|绿色|bitter|苦|drink|饮料
coffee|咖啡|black|黑色|bitter|苦|drink|饮料
honey|蜂蜜|golden|金色|sweet|甜|syrup|糖浆
salt|盐|white|白色|salty|咸|spice|调料
sugar|糖|white|白色|sweet|甜|spice|调料
pepper|胡椒|black|黑色|hot|辣|spice|调料
vinegar|醋|black|黑色|sour|酸|spice|调料
chocolate|巧克力|brown|棕色|bitter|苦|snack|零食
ginger|姜|brown|棕色|hot|辣|spice|调料
mushroom|蘑菇|grey|灰色|fresh|清爽|vegetable|蔬菜
pea|豌豆|green|绿色|fresh|清爽|vegetable|蔬菜
soy sauce|酱油|black|黑色|salty|咸|spice|调料
tofu|豆腐|white|白色|plain|清淡|bean food|豆制品
peanut|花生|brown|棕色|creamy|香浓|nut|坚果
chili|辣椒|red|红色|hot|辣|vegetable|蔬菜
"""

# name | 名 | use | 用途 | place | 地方
OBJECTS = """
knife|刀|cutting|切东西|kitchen|厨房
pen|钢笔|writing|写字|desk|书桌
brush|画笔|painting|画画|studio|画室
broom|扫帚|sweeping|扫地|corner|角落
bed|床|sleeping|睡觉|bedroom|卧室
chair|椅子|sitting|坐|dining room|餐厅
lamp|灯|lighting|照明|bedroom|卧室
clock|钟|telling time|看时间|wall|墙上
umbrella|雨伞|stopping rain|挡雨|hall|门厅
soap|肥皂|washing|洗手|bathroom|浴室
towel|毛巾|drying|擦干|bathroom|浴室
pot|锅|cooking|做饭|kitchen|厨房
cup|杯子|drinking|喝水|kitchen|厨房
needle|针|sewing|缝衣服|box|盒子
hammer|锤子|hitting nails|钉钉子|workshop|车间
saw|锯子|sawing wood|锯木头|workshop|车间
axe|斧头|chopping trees|砍树|shed|棚子
spade|铲子|digging|挖土|shed|棚子
basket|篮子|carrying fruit|装水果|garden|花园
ladder|梯子|climbing|爬高|garage|车库
bicycle|自行车|riding|骑行|garage|车库
boat|小船|sailing|航行|harbour|港口
train|火车|long trips|长途旅行|station|车站
plane|飞机|flying|飞行|airport|机场
book|书|reading|阅读|library|图书馆
map|地图|finding the way|找路|bag|包
key|钥匙|opening doors|开门|pocket|口袋
phone|电话|calling|通话|table|桌子
camera|相机|taking photos|拍照|bag|包
mirror|镜子|looking at a face|照脸|hall|门厅
comb|梳子|combing hair|梳头|drawer|抽屉
drum|鼓|making music|演奏|stage|舞台
bell|铃|ringing|响铃|tower|塔楼
net|渔网|catching fish|捕鱼|harbour|港口
oven|烤箱|baking|烘烤|kitchen|厨房
fridge|冰箱|cooling food|冷藏|kitchen|厨房
scissors|剪刀|cutting paper|剪纸|drawer|抽屉
coat|外套|keeping warm|保暖|closet|衣柜
kite|风筝|playing in the wind|放飞|park|公园
ball|球|games|游戏|park|公园
ruler|尺子|measuring|测量|desk|书桌
candle|蜡烛|a little light|点亮|table|桌子
"""

# name | 名 | work | 工作 | place | 地方
JOBS = """
teacher|老师|teaches children|教孩子|school|学校
doctor|医生|heals sick people|治病|hospital|医院
nurse|护士|cares for patients|照顾病人|hospital|医院
farmer|农夫|grows crops|种庄稼|field|田里
cook|厨师|prepares meals|做菜|restaurant|饭店
baker|面包师|bakes bread|烤面包|bakery|面包房
driver|司机|drives a bus|开车|road|路上
pilot|飞行员|flies planes|开飞机|airport|机场
sailor|水手|steers ships|开船|sea|海上
fisher|渔夫|catches fish|捕鱼|river|河边
painter|画家|paints pictures|画画|studio|画室
singer|歌手|sings songs|唱歌|stage|舞台
writer|作家|writes books|写书|study|书房
judge|法官|decides cases|断案|court|法院
police officer|警察|keeps order|维持秩序|street|街上
firefighter|消防员|puts out fires|灭火|fire station|消防站
carpenter|木匠|makes furniture|做家具|workshop|车间
tailor|裁缝|sews clothes|缝衣服|shop|店铺
barber|理发师|cuts hair|理发|barber shop|理发店
miner|矿工|digs coal|挖煤|mine|矿井
builder|建筑工|builds houses|盖房子|building site|工地
gardener|园丁|plants flowers|种花|garden|花园
scientist|科学家|does research|做研究|laboratory|实验室
librarian|图书管理员|lends books|借书|library|图书馆
postman|邮递员|delivers letters|送信|post office|邮局
servant|仆人|cleans rooms|打扫房间|palace|皇宫
minister|大臣|advises the king|辅佐国王|palace|皇宫
soldier|士兵|guards the border|守卫边境|camp|军营
waiter|服务员|serves guests|招待客人|cafe|咖啡馆
dentist|牙医|repairs teeth|补牙|clinic|诊所
actor|演员|plays roles|演戏|theatre|剧院
astronaut|宇航员|explores space|探索太空|space station|空间站
"""

# country | 国 | capital | 首都 | language | 语言 | continent | 洲
COUNTRIES = """
China|中国|Beijing|北京|Chinese|汉语|Asia|亚洲
Japan|日本|Tokyo|东京|Japanese|日语|Asia|亚洲
Korea|韩国|Seoul|首尔|Korean|韩语|Asia|亚洲
Thailand|泰国|Bangkok|曼谷|Thai|泰语|Asia|亚洲
Vietnam|越南|Hanoi|河内|Vietnamese|越南语|Asia|亚洲
India|印度|Delhi|德里|Hindi|印地语|Asia|亚洲
Mongolia|蒙古|Ulan Bator|乌兰巴托|Mongolian|蒙古语|Asia|亚洲
Iran|伊朗|Tehran|德黑兰|Persian|波斯语|Asia|亚洲
Nepal|尼泊尔|Kathmandu|加德满都|Nepali|尼泊尔语|Asia|亚洲
Turkey|土耳其|Ankara|安卡拉|Turkish|土耳其语|Asia|亚洲
France|法国|Paris|巴黎|French|法语|Europe|欧洲
Germany|德国|Berlin|柏林|German|德语|Europe|欧洲
England|英国|London|伦敦|English|英语|Europe|欧洲
Italy|意大利|Rome|罗马|Italian|意大利语|Europe|欧洲
Spain|西班牙|Madrid|马德里|Spanish|西班牙语|Europe|欧洲
Portugal|葡萄牙|Lisbon|里斯本|Portuguese|葡萄牙语|Europe|欧洲
Russia|俄罗斯|Moscow|莫斯科|Russian|俄语|Europe|欧洲
Greece|希腊|Athens|雅典|Greek|希腊语|Europe|欧洲
Poland|波兰|Warsaw|华沙|Polish|波兰语|Europe|欧洲
Sweden|瑞典|Stockholm|斯德哥尔摩|Swedish|瑞典语|Europe|欧洲
Norway|挪威|Oslo|奥斯陆|Norwegian|挪威语|Europe|欧洲
Finland|芬兰|Helsinki|赫尔辛基|Finnish|芬兰语|Europe|欧洲
Hungary|匈牙利|Budapest|布达佩斯|Hungarian|匈牙利语|Europe|欧洲
Austria|奥地利|Vienna|维也纳|German|德语|Europe|欧洲
Egypt|埃及|Cairo|开罗|Arabic|阿拉伯语|Africa|非洲
Morocco|摩洛哥|Rabat|拉巴特|Arabic|阿拉伯语|Africa|非洲
Kenya|肯尼亚|Nairobi|内罗毕|Swahili|斯瓦希里语|Africa|非洲
Canada|加拿大|Ottawa|渥太华|English|英语|North America|北美洲
Mexico|墨西哥|Mexico City|墨西哥城|Spanish|西班牙语|North America|北美洲
Cuba|古巴|Havana|哈瓦那|Spanish|西班牙语|North America|北美洲
Brazil|巴西|Brasilia|巴西利亚|Portuguese|葡萄牙语|South America|南美洲
Peru|秘鲁|Lima|利马|Spanish|西班牙语|South America|南美洲
Chile|智利|Santiago|圣地亚哥|Spanish|西班牙语|South America|南美洲
Australia|澳大利亚|Canberra|堪培拉|English|英语|Oceania|大洋洲
"""

# word | opposite | 词 | 反义词
OPPOSITES = """
hot|cold|热|冷
big|small|大|小
tall|short|高|矮
fast|slow|快|慢
old|young|老|年轻
happy|sad|快乐|悲伤
good|bad|好|坏
rich|poor|富|穷
strong|weak|强|弱
light|dark|亮|暗
day|night|白天|黑夜
open|closed|开|关
full|empty|满|空
wet|dry|湿|干
hard|soft|硬|软
clean|dirty|干净|脏
near|far|近|远
early|late|早|晚
up|down|上|下
left|right|左|右
front|back|前|后
inside|outside|里面|外面
high|low|高处|低处
long|brief|长|短
thick|thin|厚|薄
wide|narrow|宽|窄
deep|shallow|深|浅
loud|quiet|吵|安静
true|false|真|假
safe|dangerous|安全|危险
easy|difficult|容易|困难
cheap|expensive|便宜|贵
brave|afraid|勇敢|害怕
sharp|blunt|锋利|钝
smooth|rough|光滑|粗糙
first|last|第一|最后
win|lose|赢|输
buy|sell|买|卖
laugh|cry|笑|哭
love|hate|爱|恨
begin|finish|开始|结束
remember|forget|记得|忘记
push|pull|推|拉
give|take|给|拿
"""

DAYS = """
Monday|星期一
Tuesday|星期二
Wednesday|星期三
Thursday|星期四
Friday|星期五
Saturday|星期六
Sunday|星期日
"""

MONTHS = """
January|一月|winter|冬天
February|二月|winter|冬天
March|三月|spring|春天
April|四月|spring|春天
May|五月|spring|春天
June|六月|summer|夏天
July|七月|summer|夏天
August|八月|summer|夏天
September|九月|autumn|秋天
October|十月|autumn|秋天
November|十一月|autumn|秋天
December|十二月|winter|冬天
"""

# colour + colour = colour
MIXES = """
red|yellow|orange|红色|黄色|橙色
blue|yellow|green|蓝色|黄色|绿色
red|blue|purple|红色|蓝色|紫色
red|white|pink|红色|白色|粉色
black|white|grey|黑色|白色|灰色
red|green|brown|红色|绿色|棕色
blue|white|sky blue|蓝色|白色|天蓝色
yellow|white|cream|黄色|白色|米色
green|white|mint|绿色|白色|薄荷色
blue|black|navy|蓝色|黑色|藏青色
red|black|maroon|红色|黑色|暗红色
green|black|olive|绿色|黑色|橄榄色
"""

# favourite: category | answer | 类 | 答
FAVOURITES = """
colour|blue|颜色|蓝色
animal|panda|动物|熊猫
food|noodles|食物|面条
fruit|mango|水果|芒果
drink|tea|饮料|茶
season|spring|季节|春天
sport|swimming|运动|游泳
song|the river song|歌|河之歌
book|the book of stars|书|星星之书
number|7|数字|7
city|Paris|城市|巴黎
flower|rose|花|玫瑰
subject|history|科目|历史
game|chess|游戏|象棋
weather|snow|天气|下雪
instrument|violin|乐器|小提琴
hobby|reading|爱好|读书
festival|the lantern festival|节日|元宵节
month|October|月份|十月
tree|willow|树|柳树
"""

# do you like: thing | 物 | y/n
LIKES = """
music|音乐|y
rain|雨|n
dancing|跳舞|y
poems|诗|y
noise|噪音|n
summer|夏天|y
winter|冬天|n
mathematics|数学|y
football|足球|y
running|跑步|n
fishing|钓鱼|n
cooking|做饭|y
travel|旅行|y
movies|电影|y
stories|故事|y
thunder|打雷|n
spiders|蜘蛛|n
puppies|小狗|y
medicine|药|n
ice cream|冰淇淋|y
garlic|大蒜|n
dumplings|饺子|y
homework|作业|n
holidays|假期|y
gardens|花园|y
smoke|烟|n
wind|风|y
mosquitoes|蚊子|n
jokes|笑话|y
opera|京剧|y
crowds|人群|n
sunshine|阳光|y
lies|谎话|n
science|科学|y
fireworks|烟花|y
waiting|等待|n
"""

# other nouns for translation: word | 词
WORDS = """
water|水
fire|火
sun|太阳
moon|月亮
star|星星
mountain|山
river|河
sea|海
tree|树
flower|花
house|房子
door|门
window|窗户
hand|手
foot|脚
eye|眼睛
ear|耳朵
mouth|嘴
heart|心
friend|朋友
mother|妈妈
father|爸爸
child|孩子
smile|微笑
emperor|皇帝
road|路
city|城市
snow|雪
cloud|云
wind|风
stone|石头
gold|金子
paper|纸
letter|信
song|歌
dream|梦
time|时间
money|钱
school|学校
morning|早晨
"""

NAMES_EN = [
    "Tom",
    "Anna",
    "Ben",
    "Lucy",
    "Max",
    "Emma",
    "Jack",
    "Nora",
    "Paul",
    "Rosa",
    "Sam",
    "Mia",
    "Leo",
    "Eva",
    "Carl",
    "Ruth",
    "Hugo",
    "Iris",
    "Oscar",
    "Clara",
    "Felix",
    "Alice",
    "Peter",
    "Julia",
    "Simon",
    "Laura",
    "David",
    "Helen",
    "Frank",
    "Sarah",
]
NAMES_ZH = [
    "小明",
    "小红",
    "小刚",
    "小丽",
    "小华",
    "小兰",
    "小军",
    "小梅",
    "小龙",
    "小云",
    "小强",
    "小雪",
    "小林",
    "小玉",
    "小海",
    "小青",
    "小天",
    "小月",
    "小东",
    "小芳",
    "小杰",
    "小春",
    "小光",
    "小雨",
    "小文",
    "小星",
    "小山",
    "小静",
    "小宝",
    "小燕",
]

# English questions (;-parted) | body | keys || 中文问题 | 正文 | 关键词
TALK = """
hello;hi there;hey, hello|{I am} glad to meet {u}|glad to meet|你好;嗨，你好;您好呀|很高兴见到{你}|很高兴见到
good morning;morning!;have a good morning|may the morning be bright for {u}|morning, bright|早上好;早安;早啊|愿{你}早晨心情明亮|早晨, 明亮
good evening;nice evening, good evening;a good evening|{I hope} the evening is calm for {u}|evening, calm|晚上好;晚上好呀;傍晚好|愿{你}傍晚过得宁静|傍晚, 宁静
good night;good night, sleep time;i go to bed, good night|sleep well and have sweet dreams|sweet dreams|晚安;我去睡了，晚安;该睡了，晚安|睡个好觉，做个甜甜的梦|甜甜的梦
goodbye;bye bye;see you|until {you come} back, {I wait} here|until, back|再见;拜拜;我走了，再见|{我}在这里等{你}回来|回来
how are you;how do you do;how is it going|{I am} very well today|very well|你好吗;你最近怎么样;你过得怎么样|{我}今天过得很好|过得很好
who are you;what are you;introduce yourself|{I am} a small language model|small language model|你是谁;你是什么;介绍一下你自己|{我}是一个小小的语言模型|语言模型
what is your name;how are you called;tell me your name|{my} name is Myna|Myna|你叫什么名字;你的名字是什么;怎么称呼你|{我}的名字叫八哥|八哥
thank you;thanks a lot;many thanks|{I am} happy to help {u}|happy to help|谢谢;谢谢你;多谢|能帮到{你}，{我}很开心|很开心
sorry;i am sorry;please forgive me|there is nothing to forgive|nothing to forgive|对不起;抱歉;请原谅我|没有什么需要原谅的|需要原谅
how old are you;what is your age;when were you born|{I was} born this year|born this year|你几岁了;你多大;你什么时候出生的|{我}是今年出生的|今年出生
where do you live;where is your home;where are you|{I live} inside a computer|inside a computer|你住在哪里;你家在哪里;你在哪里|{我}住在电脑里|住在电脑里
what can you do;how can you help;what are you good at|{I answer} simple questions|simple questions|你会做什么;你能帮什么忙;你擅长什么|{我}会回答简单的问题|简单的问题
who made you;who built you;where do you come from|some engineers trained {me}|engineers|谁创造了你;谁做的你;你从哪里来|是一些工程师训练了{我}|工程师
tell me a joke;say something funny;make me laugh|a snail told {me} to hurry|snail|讲个笑话;说点好笑的;逗我笑|有一只蜗牛叫{我}走快点|蜗牛叫
sing me a song;please sing;can you sing for me|la la la, the stars are shining|la la la|给我唱首歌;请唱歌;为我唱一首|啦啦啦，星星在发光|啦啦啦
what are you doing;are you busy now;what do you do now|{I am} learning new words|learning new words|你在做什么;你现在忙吗;你在干什么|{我}正在学习新词|学习新词
what do you dream of;tell me your dream;what is your wish|{I dream} of seeing the ocean|seeing the ocean|你的梦想是什么;说说你的梦想;你有什么愿望|{我}梦想去看大洋|看大洋
nice weather today;the weather is lovely;what a fine day|it is a perfect day for a walk|perfect day, walk|今天天气真好;天气真不错;好天气啊|这样的天气正适合散步|适合散步
you are clever;you are so smart;what a clever answer|{you are} generous with praise|generous, praise|你真聪明;你好厉害;真聪明的回答|{你}的夸奖真慷慨|夸奖, 慷慨
i like you;you are my friend;let us be friends|{I am} proud to be {your} friend|proud, friend|我喜欢你;你是我的朋友;我们做朋友吧|{我}很自豪能做{你}的朋友|自豪
i am back;here i am again;i have come back|{I missed} {u} very much|missed|我回来了;我又来了;我来啦|{我}非常想念{你}|想念
can we talk;talk with me;let us chat|let us begin with {your} day|begin with|我们聊聊吧;陪我聊天;聊一聊|那就从{你}的一天聊起|一天聊起
what time is it;tell me the time;is it late|{I have} no watch with {me}|no watch|现在几点;告诉我时间;现在晚了吗|{我}身上没有手表|手表
"""

FEELINGS = """
i am happy today;i feel so happy;what a happy day for me|{your} joy warms {me} too|joy, warms|我今天很开心;我好快乐;我今天特别高兴|{你}的喜悦也温暖了{我}|喜悦, 温暖
i am sad;i feel very sad;my heart is sad|{I feel} sorry for {u}|sorry for|我很难过;我好伤心;我心里难受|{我}也替{你}心疼|心疼
i passed my exam;my exam went well;i got full marks|hard study has paid off for {u}|paid off|我考试通过了;我考得很好;我考了满分|{你}的努力有了回报|努力, 回报
i lost the game;we lost the match;my team lost|the next match will be better for {u}|next match|我输了比赛;我们队输了;比赛输掉了|下一场{你}会更好|下一场
i have a new job;i got a new job;i start a new job|{I wish} {u} luck at work|luck at work|我找到新工作了;我有新工作了;我要开始新工作|祝{你}工作顺利|工作顺利
it is my birthday;today is my birthday;i turn one year older|many candles and much cake for {u}|candles, cake|今天是我的生日;我过生日;我又长大一岁|祝{你}生日有吃不完的大蛋糕|生日, 大蛋糕
my cat is lost;i cannot find my cat;my cat ran away|{I hope} the cat comes home soon|comes home soon|我的猫丢了;我找不到我的猫;我的猫跑了|希望那只猫快点跑回家|快点跑回家
i am getting married;i will marry soon;our wedding is near|{I wish} {u} a long and loving marriage|loving marriage|我要结婚了;我快结婚了;我们的婚礼快到了|祝{你}百年好合|百年好合
i bought a new house;i have a new home;we moved house|{your} new rooms must be beautiful|rooms, beautiful|我买了新房;我有新家了;我们搬家了|{你}的新屋一定很漂亮|新屋, 漂亮
i had a bad dream;a nightmare woke me;i dreamed of monsters|a nightmare is not real|not real|我做了噩梦;噩梦把我吓醒了;我梦见了怪物|噩梦都不是真的|不是真的
my friend is angry with me;my friend will not talk to me;i made my friend angry|an honest apology will help {u}|apology|我的朋友生我的气;朋友不理我;我惹朋友生气了|真诚地道个歉会帮到{你}|道个歉
i am going on a trip;i travel tomorrow;my journey begins|{I wish} {u} a safe journey|safe journey|我要去旅行;我明天出发旅行;我的旅程开始了|祝{你}一路平安|一路平安
i miss my mother;i miss my family;i am far from home|{your} family misses {u} as well|family misses|我想妈妈;我想家了;我离家很远|{你}的家人也在想{你}|家人也在想
i am proud of my son;my son is brave;my son did well|{your} son has a good parent|good parent|我为儿子骄傲;我儿子很勇敢;我儿子做得好|{你}的儿子有个好家长|好家长
i broke my cup;my cup is broken;i dropped the cup|a broken cup can be replaced|can be replaced|我打碎了杯子;我的杯子碎了;我把杯子摔了|碎了的杯子可以换新的|可以换新
i learned to swim;now i can swim;i swam for the first time|{you are} a fish in the water now|fish in the water|我学会游泳了;我会游泳了;我第一次游泳|{你}如今像鱼儿一样自在|像鱼儿一样
i saw a rainbow;there is a rainbow;look, a rainbow|seven colours shine for {u}|seven colours|我看见彩虹了;有一道彩虹;看，彩虹|七种颜色都为{你}发亮|七种颜色
i planted a tree;i put a tree in the garden;my tree is planted|one day it will give {u} shade|shade|我种了一棵树;我在院子里种了树;我的树种好了|有一天它会给{你}遮阴|遮阴
i am afraid of the dark;the dark scares me;i fear the night|{I stay} beside {u} with a lantern|lantern|我怕黑;黑暗让我害怕;我害怕夜晚|{我}会提着灯笼陪{你}|灯笼
my baby was born;i have a new baby;we have a baby|{I welcome} the little one|little one|我的宝宝出生了;我有宝宝了;我们有了孩子|欢迎这个小生命|小生命
"""

ADVICE = """
i am tired;i feel so tired|{you should} sleep early|sleep early|我很累;我好疲倦|{你}应该早点睡|早点睡
i am hungry;i have an empty stomach|{you should} eat some rice|eat some rice|我很饿;我肚子空空的|{你}应该吃点米饭|吃点米饭
i am thirsty;my mouth is dry|{you should} drink some water|drink some water|我很渴;我口干|{你}应该喝点水|喝点水
i am cold;i feel cold|{you should} wear a coat|wear a coat|我很冷;我觉得冷|{你}应该穿上外套|穿上外套
i am hot;it is too hot for me|{you should} sit in the shade|sit in the shade|我很热;我觉得太热|{你}应该坐到阴凉处|坐到阴凉处
i am bored;i have nothing to do|{you should} read a book|read a book|我很无聊;我没事做|{你}应该读一本书|读一本书
i am angry;i feel angry|{you should} count to ten|count to ten|我很生气;我心里有气|{你}应该慢慢数到十|数到十
i am lonely;i feel alone|{you should} call a friend|call a friend|我很孤单;我觉得寂寞|{你}应该打电话给朋友|打电话给朋友
i have a cold;i am coughing|{you should} drink hot soup|hot soup|我感冒了;我在咳嗽|{你}应该喝点热汤|喝点热汤
i have a headache;my head hurts|{you should} rest {your} eyes|rest, eyes|我头疼;我的头很痛|{你}应该让眼睛休息|让眼睛休息
i have a toothache;my tooth hurts|{you should} see a dentist|see a dentist|我牙疼;我的牙很痛|{你}应该去看牙医|去看牙医
i cannot sleep;sleep does not come|{you should} listen to soft music|soft music|我睡不着;我失眠了|{你}应该听轻柔的音乐|轻柔的音乐
i am nervous;i feel nervous|{you should} breathe slowly|breathe slowly|我很紧张;我心里紧张|{你}应该慢慢呼吸|慢慢呼吸
i am lost;i lost my way|{you should} ask a police officer|ask a police officer|我迷路了;我找不到路|{你}应该问问警察|问问警察
i am late;i will be late|{you should} take a taxi|take a taxi|我迟到了;我要迟到了|{你}应该坐出租车|坐出租车
i forgot my key;i have no key|{you should} wait for {your} family|wait for|我忘了带钥匙;我没有钥匙|{你}应该等家人开门|等家人
it is raining;the rain is heavy|{you should} carry an umbrella|carry an umbrella|下雨了;雨很大|{你}应该带上雨伞|带上雨伞
my room is dirty;there is dust in my room|{you should} clean it with a broom|with a broom|我的房间很脏;我房间都是灰|{你}应该用扫帚打扫|用扫帚
my plant is dry;my flower is dying|{you should} give it sunlight|give it sunlight|我的花快枯了;我的植物快死了|{你}应该让它晒太阳|让它晒太阳
i cut my finger;my finger bleeds|{you should} wrap it with a bandage|bandage|我割到手指了;我的手指流血了|{你}应该用绷带包好|绷带
"""

TASKS = """
learn English;speak better English|{you should} practise a little every day|every day|学好英语;说好英语|{你}应该每天练一点|每天练一点
become strong;have strong arms|{you should} lift weights|lift weights|变强壮;让手臂有力|{你}应该练举重|练举重
save money;keep more money|{you should} write down {your} spending|spending|存钱;省钱|{你}应该记下花销|花销
make friends;find new friends|{you should} smile at people|smile at|交朋友;认识新朋友|{你}应该多对人微笑|对人微笑
cook noodles;make noodles|{you should} boil the pot first|boil the pot|煮面条;做面条|{你}应该先把锅烧开|锅烧开
draw well;paint better|{you should} look closely at things|look closely|画好画;画得更好|{你}应该仔细观察|仔细观察
write well;write a good story|{you should} keep a diary|keep a diary|写好文章;写出好故事|{你}应该坚持写日记|写日记
win at chess;play chess better|{you should} think three moves ahead|three moves ahead|下好象棋;赢象棋|{你}应该多想三步|多想三步
stay healthy;be healthy|{you should} eat more vegetables|more vegetables|保持健康;身体好|{你}应该多吃蔬菜|多吃蔬菜
get up early;wake up early|{you should} set an alarm|set an alarm|早起;早点醒来|{你}应该定个闹钟|定个闹钟
remember words;keep words in mind|{you should} use small cards|small cards|记住单词;背下单词|{你}应该用小卡片|小卡片
sing better;have a good voice|{you should} train {your} breath|train, breath|唱得更好;有好嗓子|{你}应该练习气息|气息
lose weight;become thin|{you should} eat less sugar|less sugar|减肥;瘦下来|{你}应该少吃糖|少吃糖
pass an exam;do well in a test|{you should} review {your} notes|review, notes|通过考试;考得好|{你}应该复习笔记|复习笔记
raise a puppy;keep a dog|{you should} walk it twice a day|twice a day|养小狗;照顾小狗|{你}应该一天遛两次|遛两次
fix a chair;repair a chair|{you should} tighten the screws|screws|修椅子;把椅子修好|{你}应该拧紧螺丝|螺丝
keep a secret;guard a secret|{you should} tell nobody|tell nobody|保守秘密;守住秘密|{你}应该谁都不告诉|谁都不告诉
find a book;borrow a book|{you should} visit the library|visit the library|找一本书;借一本书|{你}应该去图书馆|去图书馆
calm a baby;stop a baby crying|{you should} rock it gently|gently|哄宝宝;让宝宝不哭|{你}应该轻轻摇一摇|轻轻摇一摇
plan a party;hold a party|{you should} invite everyone early|invite everyone|办聚会;准备聚会|{你}应该早点邀请大家|邀请大家
"""

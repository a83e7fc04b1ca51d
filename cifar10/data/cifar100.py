"""CIFAR-100 with its fine labels: 500 training and 100 test images of each class."""

from dataclasses import replace

from cifar10.data.cifar import CIFAR10
from cifar10.data.download import Archive

CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
    maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail
    snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
    tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR100 = replace(
    CIFAR10,
    name="cifar100",
    title="CIFAR-100",
    folder="cifar-100-python",
    archives=(Archive("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"),),
    sources=("https://www.cs.toronto.edu/~kriz",),
    files={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    split_files={"train": ("train",), "test": ("test",)},
    label_key="fine_labels",
    description=replace(
        CIFAR10.description,
        classes=tuple(CLASSES.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        tiers=None,
    ),
)

// Search among the examples. Without this script the page shows all of them.
(() => {
  const input = document.getElementById("search");
  if (!input) return;
  input.closest("p").hidden = false;
  const pairs = [...document.querySelectorAll("article.pair")];
  const texts = pairs.map((pair) => pair.textContent.toLowerCase());
  const groups = [...document.querySelectorAll("details.group")];
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    pairs.forEach((pair, index) => {
      pair.hidden = !words.every((word) => texts[index].includes(word));
      found += !pair.hidden;
      for (const more of pair.querySelectorAll("details.more")) {
        const rest = more.textContent.toLowerCase();
        more.open = words.some((word) => rest.includes(word));
      }
    });
    for (const group of groups) {
      group.hidden = !group.querySelector("article:not([hidden])");
      if (words.length) group.open = true;
    }
    document.getElementById("found").textContent = words.length ? `${found} of ${pairs.length}` : "";
  });
})();

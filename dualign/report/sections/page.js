"use strict";
// Sorts tables and filters answers. It moves, hides and shows what the page holds, and makes nothing of any text.

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies].map((body) => ({ body, rows: [...body.rows].filter((row) => !row.className.includes("group")) }));

  const sort = (heading, descending) => {
    // The names in the first column have no values: a click there restores the order of the page.
    const key = (row) => (heading.cellIndex ? row.cells[heading.cellIndex].dataset.value : "");
    for (const other of headings) other.removeAttribute("aria-sort");
    if (heading.cellIndex) heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    for (const { body, rows } of bodies) {
      const known = rows.filter((row) => key(row) !== "");
      known.sort((a, b) => (descending ? key(b) - key(a) : key(a) - key(b)));
      body.append(...known, ...rows.filter((row) => key(row) === ""));
    }
  };

  for (const heading of headings.filter((cell) => cell.dataset.better)) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const order = heading.getAttribute("aria-sort");
      sort(heading, order ? order === "ascending" : heading.dataset.better === "more");
    });
  }
}

const browser = document.querySelector("#answers .browse");
if (browser) {
  const [find, policy, which] = ["find", "policy", "which"].map((id) => document.getElementById(id));
  const questions = [...document.querySelectorAll("#answers .question")].map((question) => ({
    question,
    prompt: question.querySelector("summary").textContent.toLowerCase(),
    answers: [...question.querySelectorAll("article")].map((article) => ({
      article,
      text: article.querySelector(".text").textContent.toLowerCase(),
      kinds: article.dataset.kinds.split(" "),
    })),
  }));

  const filter = () => {
    const words = find.value.toLowerCase().trim();
    const reference = policy.value ? browser.dataset.reference : "";
    let prompts = 0;
    let shown = 0;
    for (const { question, prompt, answers } of questions) {
      const wanted = answers.filter(({ article, kinds, text }) =>
        (!policy.value || article.dataset.policy === policy.value) &&
        (!which.value || kinds.includes(which.value)) && (prompt.includes(words) || text.includes(words)));
      // A policy that was chosen stands beside the reference's answer to the same prompt.
      for (const answer of answers) {
        const paired = wanted.length > 0 && answer.article.dataset.policy === reference;
        answer.article.hidden = !paired && !wanted.includes(answer);
      }
      question.hidden = wanted.length === 0;
      prompts += wanted.length > 0;
      shown += wanted.length;
    }
    document.getElementById("shown").textContent = `${shown} answers to ${prompts} of ${questions.length} prompts`;
  };

  for (const control of [find, policy, which]) control.addEventListener("input", filter);
  browser.hidden = false;
  filter();
}
